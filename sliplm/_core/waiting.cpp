// Waiting for a socket.
#include <poll.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <chrono>

#include "released.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace slip {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kMargin = 30;   // microseconds before what is expected: it varies, too
constexpr double kLatest = 200;  // what took longer was something else: another process had the core

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

// Whether the socket `fd` has something to read (or an end, or an error): sleeps until shortly before it is `expected`, in
// so many microseconds, then asks again and again for `spin` more. Waking up takes longer than many exchanges do, how
// long depends on the machine, and to ask is work: so a thread sleeps as long as it may by how late it woke before.
// Gives way to others.
bool wait_readable(int fd, double expected, double spin) {
    const Released released;
    static thread_local double late = 50;  // by so many microseconds it woke too late, on average
    const double sleep = expected - late - kMargin;
    if (sleep > 0) {
        wake_in_time();
        const auto before = Clock::now();
        if (ready(fd, int64_t(sleep * 1e3)) != 0) return true;
        const std::chrono::duration<double, std::micro> slept = Clock::now() - before;
        late += (std::min(slept.count() - sleep, kLatest) - late) / 16;
    }
    const auto deadline = Clock::now() + std::chrono::duration<double, std::micro>(spin);
    for (;;) {
        if (ready(fd, 0) != 0) return true;
        if (Clock::now() >= deadline) return false;
        sched_yield();
    }
}

}  // namespace

void bind_waiting(nb::module_& m) { m.def("wait_readable", &wait_readable, "fd"_a, "expected"_a, "spin"_a); }

}  // namespace slip
