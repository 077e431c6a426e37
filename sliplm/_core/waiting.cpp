// Waiting for a socket.
#include <nanobind/nanobind.h>
#include <poll.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <chrono>

namespace nb = nanobind;
using namespace nb::literals;

namespace slip {
namespace {

using Clock = std::chrono::steady_clock;

int ready(int fd, int64_t nanoseconds) {
    pollfd one{fd, POLLIN, 0};
#if defined(__linux__)
    timespec limit{nanoseconds / 1000000000, nanoseconds % 1000000000};
    return ppoll(&one, 1, &limit, nullptr);
#else
    return poll(&one, 1, int(nanoseconds / 1000000));
#endif
}

// The kernel may wake a thread 50 us late, unless the thread wants it otherwise; a fine timer costs only when it is used.
void wake_in_time() {
#if defined(__linux__)
    static thread_local bool said = false;
    if (!said) said = prctl(PR_SET_TIMERSLACK, 1000UL) == 0;
#endif
}

// Whether the socket `fd` has something to read (or an end, or an error): sleeps for so many microseconds at most, then
// asks again and again for so many more. Waking up takes longer than many exchanges do, so whoever knows how long one
// takes sleeps for less and stays awake for the rest. Gives way to others.
bool wait_readable(int fd, double sleep, double spin) {
    nb::gil_scoped_release release;
    if (sleep > 0) {
        wake_in_time();
        if (ready(fd, int64_t(sleep * 1e3)) != 0) return true;
    }
    const auto deadline = Clock::now() + std::chrono::duration<double, std::micro>(spin);
    for (;;) {
        if (ready(fd, 0) != 0) return true;
        if (Clock::now() >= deadline) return false;
        sched_yield();
    }
}

}  // namespace

void bind_waiting(nb::module_& m) { m.def("wait_readable", &wait_readable, "fd"_a, "sleep"_a, "spin"_a); }

}  // namespace slip
