// Bytes through TLS: from one piece of memory to a socket and back, record after record, without Python between them.
//
// OpenSSL is the one that Python's package `cryptography` carries; its functions come as addresses. What goes well is done
// here. Whatever stops it (an end, a failure, a peer that is silent) is told, and Python judges it.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "released.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace slip {
namespace {

using Clock = std::chrono::steady_clock;  // Linux: what Python's time.monotonic reads

constexpr size_t kRecord = 1 << 14;                     // bytes of data in a record, at most
constexpr size_t kRecordOnTheWire = kRecord + 256 + 5;  // RFC 8446, section 5.2
constexpr size_t kPiece = 1 << 16;            // so much is received and sent at a time: what is in a cache stays there
constexpr size_t kRoom = kPiece + 8 * 1024;   // for a piece's records, and what TLS answers by itself
constexpr size_t kMostWithoutData = 1 << 16;  // bytes that may come before the next one of data
constexpr int kTogether = 5;  // milliseconds in which the bytes of a piece are expected to come together
constexpr int kWantRead = 2;  // SSL_ERROR_WANT_READ

enum Stop : int { kNothing, kFailed, kEnd, kSystem, kTimeout, kWouldBlock, kEmpty, kKeys };

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

// Memory that Python lends: contiguous bytes.
class Lent {
public:
    Lent(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
    }
    ~Lent() { PyBuffer_Release(&view_); }
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;
    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    size_t size() const { return size_t(view_.len); }

private:
    Py_buffer view_;
};

// While it lives, a socket counts as readable only when so many bytes are there, or its end, or an error.
class Least {
public:
    Least(int fd, size_t bytes) : fd_(fd) { set(int(bytes)); }
    ~Least() { set(1); }
    Least(const Least&) = delete;
    Least& operator=(const Least&) = delete;

private:
    void set(int bytes) { setsockopt(fd_, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes); }
    int fd_;
};

class Records {
public:
    using Addresses = nb::typed<nb::sequence, uintptr_t>;

    Records(nb::object owner, uintptr_t ssl, uintptr_t in, uintptr_t out, Addresses functions)
        : owner_(std::move(owner)), ssl_(pointer(ssl)), in_(pointer(in)), out_(pointer(out)) {
        if (nb::len(functions) != 8) throw std::invalid_argument("eight functions are needed");
        const auto address = [&](size_t i) { return nb::cast<uintptr_t>(functions[i]); };
        ssl_read_ = reinterpret_cast<decltype(ssl_read_)>(address(0));
        ssl_write_ = reinterpret_cast<decltype(ssl_write_)>(address(1));
        ssl_pending_ = reinterpret_cast<decltype(ssl_pending_)>(address(2));
        ssl_error_ = reinterpret_cast<decltype(ssl_error_)>(address(3));
        bio_read_ = reinterpret_cast<decltype(bio_read_)>(address(4));
        bio_write_ = reinterpret_cast<decltype(bio_write_)>(address(5));
        bio_data_ = reinterpret_cast<decltype(bio_data_)>(address(6));
        clear_errors_ = reinterpret_cast<decltype(clear_errors_)>(address(7));
    }

    // Reads into memory until it holds `least` bytes, and what else is there; how many it holds. See `_native.pyi`.
    size_t read(int fd, nb::handle into, size_t least, double silence, double deadline) {
        const Lent room(into, PyBUF_WRITABLE);
        if (room.size() == 0 || least > room.size()) throw std::invalid_argument("there is no room to read to");
        const Released released;
        size_t done = 0, without = 0;
        fd_ = fd;
        stop_ = kNothing;
        clear_errors_();  // of something else in this thread
        for (;;) {
            while (done < room.size() && (available(in_) > 0 || ssl_pending_(ssl_) > 0)) {
                const size_t most = std::min<size_t>(room.size() - done, 1 << 30);
                result_ = ssl_read_(ssl_, room.data() + done, int(most));
                if (result_ <= 0) {
                    if (ssl_error_(ssl_, result_) == kWantRead) break;
                    stop_ = kFailed;
                    return done;
                }
                done += size_t(result_);
                without = 0;
            }
            if (done >= least) return done;
            if (without > kMostWithoutData) return stopped(kEmpty, done);
            if (available(out_) > kPiece) return stopped(kKeys, done);
            if (without > 0 && std::isinf(deadline) && silence > 0) deadline = now() + silence;
            const size_t count = receive(least - done, silence, deadline);
            if (count == 0) return done;
            without += count;
        }
    }

    // Seals and sends data from its first byte on; how many were taken, of which some may be unsent.
    size_t write(int fd, nb::handle data, double silence) {
        const Lent from(data, PyBUF_SIMPLE);
        const Released released;
        fd_ = fd;
        stop_ = kNothing;
        clear_errors_();
        size_t done = 0;
        while (send(silence) && done < from.size()) {
            const size_t piece = std::min(done + kPiece, from.size());
            while (done < piece) {
                result_ = ssl_write_(ssl_, from.data() + done, int(std::min(piece - done, kRecord)));
                if (result_ <= 0) return stopped(kFailed, done);
                done += size_t(result_);
                take();
            }
        }
        return done;
    }

    // Sends what is unsent; whether all of it went.
    bool flush(int fd, double silence) {
        const Released released;
        fd_ = fd;
        stop_ = kNothing;
        return send(silence);
    }

    bool unsent() const { return sent_ < sealed_.used; }
    bool waiting() const { return available(in_) > 0 || ssl_pending_(ssl_) > 0; }
    int stop() const { return stop_; }
    int result() const { return result_; }
    int error() const { return error_; }

private:
    struct Room {
        std::unique_ptr<uint8_t[]> bytes;
        size_t size = 0, used = 0;

        void hold(size_t count) {
            if (count <= size) return;
            auto larger = std::make_unique_for_overwrite<uint8_t[]>(count);
            std::copy_n(bytes.get(), used, larger.get());
            bytes = std::move(larger);
            size = count;
        }
    };

    static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

    size_t stopped(Stop why, size_t done) {
        stop_ = why;
        return done;
    }

    size_t failed(int error) {
        error_ = error;
        return stopped(kSystem, 0);
    }

    size_t available(void* bio) const {
        char* start;
        const long count = bio_data_(bio, &start);
        return count > 0 ? size_t(count) : 0;
    }

    // What TLS has to send, to the end of what is sealed.
    void take() {
        while (const size_t count = available(out_)) {
            sealed_.hold(std::max(sealed_.used + count, kRoom));
            const int got = bio_read_(out_, sealed_.bytes.get() + sealed_.used, int(count));
            if (got <= 0) return;
            sealed_.used += size_t(got);
        }
    }

    // Hands TLS some bytes of the socket's, at least one; how many. `wanted` bytes of data are to come.
    size_t receive(size_t wanted, double silence, double deadline) {
        if (incoming_.size == 0) incoming_.hold(kRecord);  // at first, since most connections carry little
        if (!std::isinf(deadline) && now() > deadline) return stopped(kTimeout, 0);
        // Some of what is wanted may have come already, in a record that is not complete.
        const size_t come = available(in_) + kRecordOnTheWire;
        bool together = wanted > come + kRecord && silence != 0;
        for (;;) {
            const ssize_t count = recv(fd_, incoming_.bytes.get(), incoming_.size, MSG_DONTWAIT);
            if (count > 0) {
                if (bio_write_(in_, incoming_.bytes.get(), int(count)) != int(count)) return failed(ENOMEM);
                if (size_t(count) == incoming_.size && incoming_.size < kPiece) incoming_.hold(kPiece);
                return size_t(count);
            }
            if (count == 0) return stopped(kEnd, 0);
            if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return failed(errno);
            if (together) {  // to be woken once for a piece is cheaper than for each of its packets
                const Least least(fd_, std::min(wanted - come, kPiece));
                pollfd one{fd_, POLLIN, 0};
                poll(&one, 1, kTogether);
                together = false;
            } else if (!wait(POLLIN, silence, deadline)) {
                return 0;
            }
        }
    }

    bool send(double silence) {
        while (unsent()) {
            const ssize_t count =
                ::send(fd_, sealed_.bytes.get() + sent_, sealed_.used - sent_, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (count >= 0) {
                sent_ += size_t(count);
            } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
                return failed(errno);
            } else if (!wait(POLLOUT, silence, INFINITY)) {
                return false;
            }
        }
        sent_ = sealed_.used = 0;
        return true;
    }

    // Until the socket is ready, or `silence` or the deadline is over. A signal's handler may raise.
    bool wait(short events, double silence, double deadline) {
        if (silence == 0) return stopped(kWouldBlock, 0);
        const double until = std::min(deadline, silence < 0 ? INFINITY : now() + silence);
        for (;;) {
            const double left = until - now();
            if (left <= 0) return stopped(kTimeout, 0);
            pollfd one{fd_, events, 0};
            const int ready = poll(&one, 1, std::isinf(left) ? -1 : int(std::ceil(std::min(left, 1e6) * 1e3)));
            if (ready > 0) return true;
            if (ready < 0 && errno != EINTR) return failed(errno);
            if (ready < 0) {
                nb::gil_scoped_acquire acquire;
                if (PyErr_CheckSignals() != 0) throw nb::python_error();
            }
        }
    }

    nb::object owner_;  // of what the pointers point to
    void *ssl_, *in_, *out_;
    int (*ssl_read_)(void*, void*, int);
    int (*ssl_write_)(void*, const void*, int);
    int (*ssl_pending_)(void*);
    int (*ssl_error_)(void*, int);
    int (*bio_read_)(void*, void*, int);
    int (*bio_write_)(void*, const void*, int);
    long (*bio_data_)(void*, char**);
    void (*clear_errors_)();
    Room incoming_, sealed_;
    size_t sent_ = 0;  // of what is sealed
    int fd_ = -1;      // of the call under way: between calls, Python may close the socket
    int stop_ = kNothing, result_ = 0, error_ = 0;
};

}  // namespace

void bind_records(nb::module_& m) {
    nb::class_<Records>(m, "Records")
        .def(nb::init<nb::object, uintptr_t, uintptr_t, uintptr_t, Records::Addresses>(), "owner"_a, "ssl"_a, "in_"_a,
             "out"_a, "functions"_a)
        .def("read", &Records::read, "fd"_a, "into"_a, "least"_a, "silence"_a, "deadline"_a)
        .def("write", &Records::write, "fd"_a, "data"_a, "silence"_a)
        .def("flush", &Records::flush, "fd"_a, "silence"_a)
        .def_prop_ro("unsent", &Records::unsent)
        .def_prop_ro("waiting", &Records::waiting)
        .def_prop_ro("stop", &Records::stop)
        .def_prop_ro("result", &Records::result)
        .def_prop_ro("error", &Records::error);
}

}  // namespace slip
