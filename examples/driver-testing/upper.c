// SPDX-License-Identifier: GPL-2.0
/* A driver for an invented virtio device that returns text in capitals: write text to /dev/upper, read
 * the answer.  It believes nothing that the device says; TRUST=1 at build time plants the usual bug.
 */
#include <linux/completion.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#define SIZE 64
static struct virtqueue *vq;
static DECLARE_COMPLETION(done);
static DEFINE_MUTEX(lock);
static char *out, *in;
static unsigned int have;
static bool stuck; /* the device may still own the buffers */

static void called(struct virtqueue *q)
{
	complete(&done);
}

static ssize_t upper_write(struct file *file, const char __user *text, size_t size, loff_t *at)
{
	struct scatterlist to, from, *both[] = { &to, &from };
	unsigned int length = 0;
	ssize_t result = -EIO;

	if (!size || size > SIZE)
		return -EINVAL;
	mutex_lock(&lock);
	have = 0;
	if (stuck && virtqueue_get_buf(vq, &length))
		stuck = false;		/* it came after all */
	if (stuck || copy_from_user(out, text, size))
		goto end;
	sg_init_one(&to, out, size);
	sg_init_one(&from, in, size);
	reinit_completion(&done);
	if (virtqueue_add_sgs(vq, both, 1, 1, out, GFP_KERNEL))
		goto end;
	virtqueue_kick(vq);
	stuck = true;
	wait_for_completion_timeout(&done, HZ);
	if (virtqueue_get_buf(vq, &length))	/* also when the call was lost */
		stuck = false;
#ifndef TRUST
	if (stuck || length != size)
		goto end;
#endif
	have = length;
	result = size;
end:
	mutex_unlock(&lock);
	return result;
}

static ssize_t upper_read(struct file *file, char __user *text, size_t size, loff_t *at)
{
	return simple_read_from_buffer(text, size, at, in, have);
}

static const struct file_operations operations = {
	.owner = THIS_MODULE, .write = upper_write, .read = upper_read,
};
static struct miscdevice node = { MISC_DYNAMIC_MINOR, "upper", &operations };

static int upper_probe(struct virtio_device *vdev)
{
	vq = virtio_find_single_vq(vdev, called, "text");
	if (IS_ERR(vq))
		return PTR_ERR(vq);
	out = kzalloc(2 * SIZE, GFP_KERNEL);
	in = out + SIZE;
	virtio_device_ready(vdev);
	return misc_register(&node);
}

static void upper_remove(struct virtio_device *vdev)
{
	misc_deregister(&node);
	virtio_reset_device(vdev);
	vdev->config->del_vqs(vdev);
	kfree(out);
	stuck = false;
}

static const struct virtio_device_id ids[] = { { 62, VIRTIO_DEV_ANY_ID }, { 0 } };
static struct virtio_driver upper_driver = {
	.driver.name = "upper", .id_table = ids, .probe = upper_probe, .remove = upper_remove,
};
module_virtio_driver(upper_driver);
MODULE_DEVICE_TABLE(virtio, ids);
MODULE_LICENSE("GPL");
