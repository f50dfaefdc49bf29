/* What the host wants: NUL-terminated records "key=value", in order.
 *
 * Lists grow by repeating a key; mount-type, mount-source and mount-options belong to
 * the last mount=TARGET.  The strings stay where they were received.  An unknown key is
 * an error: host and guest come from the same release.
 */
#include "init.h"

#include <stdlib.h>
#include <string.h>

static void *grown(void *list, size_t count, size_t item)
{
	/* one more than asked for: lists of strings end with a null pointer */
	void *bigger = realloc(list, (count + 2) * item);

	if (!bigger)
		fatal("no memory for the command's description");
	return bigger;
}

static char **append(char **list, size_t *count, char *value)
{
	list = grown(list, *count, sizeof *list);
	list[(*count)++] = value;
	list[*count] = NULL;
	return list;
}

static struct mount_spec *last_mount(struct spec *spec, const char *key)
{
	if (!spec->mount_count)
		fatal("%s before any mount", key);
	return &spec->mounts[spec->mount_count - 1];
}

static void add_mount(struct spec *spec, const char *target)
{
	spec->mounts = grown(spec->mounts, spec->mount_count, sizeof *spec->mounts);
	spec->mounts[spec->mount_count++] = (struct mount_spec){ .target = target };
}

static void add_group(struct spec *spec, const char *number)
{
	spec->groups = grown(spec->groups, spec->group_count, sizeof *spec->groups);
	spec->groups[spec->group_count++] = (gid_t)strtoul(number, NULL, 10);
}

static void set_tty(struct spec *spec, char *size)
{
	spec->tty = true;
	spec->rows = (unsigned)strtoul(size, &size, 10);
	spec->columns = *size ? (unsigned)strtoul(size + 1, NULL, 10) : 0;
}

struct counts {
	size_t args, env;
};

static void apply(struct spec *spec, struct counts *counts, const char *key, char *value)
{
	if (!strcmp(key, "arg"))
		spec->argv = append(spec->argv, &counts->args, value);
	else if (!strcmp(key, "env"))
		spec->env = append(spec->env, &counts->env, value);
	else if (!strcmp(key, "cwd"))
		spec->cwd = value;
	else if (!strcmp(key, "hostname"))
		spec->hostname = value;
	else if (!strcmp(key, "uid"))
		spec->uid = (uid_t)strtoul(value, NULL, 10);
	else if (!strcmp(key, "gid"))
		spec->gid = (gid_t)strtoul(value, NULL, 10);
	else if (!strcmp(key, "group"))
		add_group(spec, value);
	else if (!strcmp(key, "tty"))
		set_tty(spec, value);
	else if (!strcmp(key, "overlay"))
		spec->overlay = !strcmp(value, "1");
	else if (!strcmp(key, "root-source"))
		spec->root.source = value;
	else if (!strcmp(key, "root-type"))
		spec->root.type = value;
	else if (!strcmp(key, "root-options"))
		spec->root.options = value;
	else if (!strcmp(key, "mount"))
		add_mount(spec, value);
	else if (!strcmp(key, "mount-source"))
		last_mount(spec, key)->source = value;
	else if (!strcmp(key, "mount-type"))
		last_mount(spec, key)->type = value;
	else if (!strcmp(key, "mount-options"))
		last_mount(spec, key)->options = value;
	else
		fatal("unknown key '%s' in the command's description", key);
}

void spec_parse(struct spec *spec, char *text, size_t size)
{
	struct counts counts = { 0, 0 };
	char *end = text + size;

	spec->root.target = "/";
	spec->env = grown(NULL, 0, sizeof *spec->env);
	spec->env[0] = NULL;
	while (text < end) {
		size_t length = strlen(text);
		char *equals = strchr(text, '=');

		if (!equals)
			fatal("record '%s' without a value", text);
		*equals = 0;
		apply(spec, &counts, text, equals + 1);
		text += length + 1;
	}
	if (!counts.args)
		fatal("the host named no command");
}
