/* The vCPU kick: how one thread gets another out of KVM_RUN, without the interpreter.
 *
 * KVM_RUN ends with EINTR when a signal arrives, but a signal that arrives between the
 * caller's last look and the ioctl would be lost.  So the kicker first stores 1 into
 * kvm_run.immediate_exit, then sends the signal: whichever side of the ioctl the runner
 * is on, it sees one of the two (Linux Documentation/virt/kvm/api.rst, KVM_RUN).  The
 * handler itself has nothing to do; it must only exist, for an ignored signal does not
 * interrupt, and it must not be Python's, which would want the GIL.
 */
#ifndef PYVMM_KICK_H
#define PYVMM_KICK_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>

/* glibc keeps the first real-time signals for itself; SIGRTMIN is the first free one, and
 * the likeliest to be in somebody's use. */
#define PYVMM_KICK_SIGNAL (SIGRTMIN + 5)

static void pyvmm_kick_handler(int signal_number)
{
    (void)signal_number;
}

/* Install the handler for the process.  Returns 0, or -1 with errno. */
static int pyvmm_kick_install(void)
{
    struct sigaction action = {.sa_handler = pyvmm_kick_handler, .sa_flags = SA_RESTART};

    sigemptyset(&action.sa_mask);
    return sigaction(PYVMM_KICK_SIGNAL, &action, NULL);
}

/* Let the signal through in the calling thread, which may have inherited a mask. */
static int pyvmm_kick_admit(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, PYVMM_KICK_SIGNAL);
    return pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* Interrupt `thread`, which must be alive.  Returns 0 or an error number. */
static int pyvmm_kick_send(pthread_t thread)
{
    return pthread_kill(thread, PYVMM_KICK_SIGNAL);
}

/* Store a byte of kvm_run that the kernel reads on behalf of another thread. */
static inline void pyvmm_store_byte(unsigned char *target, unsigned char value)
{
    __atomic_store_n(target, value, __ATOMIC_SEQ_CST);
}

#endif
