// A few threads that wait for work. A caller always works too, so a slow wake-up costs little; a second caller at the
// same time works alone; a forked child makes its own.
#pragma once
#include <cstddef>
#include <functional>

namespace slip {

size_t cores();  // those this process may run on, or fewer: see limit_threads

// From now on nothing here uses more than n threads; 0 lifts the limit.
void limit_threads(size_t n);

// So many threads that each has something like 20 microseconds to do; waking one costs a few.
size_t threads_for(size_t work, size_t each);

// Calls task(i) for every i < count, on at most `threads` threads (0: every core), and returns when all are done.
void parallel(size_t count, size_t threads, const std::function<void(size_t)>& task);

// This thread's memory for n floats, aligned for vectors, until its next call.
float* scratch(size_t n);

}  // namespace slip
