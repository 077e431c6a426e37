// The GIL, for calls that may wait for long.
#pragma once
#include <nanobind/nanobind.h>
#include <unistd.h>

namespace slip {

// Lets other threads of Python run while it lives. Python before 3.14 ends a thread that comes back to an interpreter
// that is ending, by an unwinding of its stack that no C++ survives. Such a thread stays here for ever instead, as it
// would from 3.14 on.
class Released {
public:
    Released() : state_(PyEval_SaveThread()) {}
    ~Released() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) pause();
        }
    }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

private:
    PyThreadState* state_;
};

}  // namespace slip
