// Waiting for a socket.
#include <nanobind/nanobind.h>
#include <poll.h>
#include <sched.h>

#include <chrono>

namespace nb = nanobind;
using namespace nb::literals;

namespace slip {
namespace {

// Whether the socket `fd` has something to read (or an end, or an error) within so many microseconds. Asks again and
// again instead of sleeping: waking a thread on an idle core costs more than most exchanges last. Gives way to others.
bool wait_readable(int fd, double microseconds) {
    nb::gil_scoped_release release;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double, std::micro>(microseconds);
    for (;;) {
        pollfd one{fd, POLLIN, 0};
        if (poll(&one, 1, 0) != 0) return true;
        if (std::chrono::steady_clock::now() >= deadline) return false;
        sched_yield();
    }
}

}  // namespace

void bind_waiting(nb::module_& m) { m.def("wait_readable", &wait_readable, "fd"_a, "microseconds"_a); }

}  // namespace slip
