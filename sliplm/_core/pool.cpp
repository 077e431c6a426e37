#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slip {
namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Spins for some microseconds: the next layer's work usually comes at once, and a wake-up costs more than that.
template <class Ready>
bool spin(Ready ready) {
    for (int i = 0; i < 400; i++) {
        if (ready()) return true;
        pause();
    }
    return false;
}

std::atomic<size_t> limit{0};

size_t all_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return size_t(CPU_COUNT(&set));
#endif
    const size_t n = std::thread::hardware_concurrency();
    return n ? n : 1;
}

class Pool {
public:
    explicit Pool(size_t workers) {
        for (size_t i = 0; i < workers; i++) std::thread([this] { work(); }).detach();
    }

    bool run(size_t count, size_t threads, const std::function<void(size_t)>& task) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            count_ = count;
            next_ = 0;
            seats_ = threads - 1;
            round_.fetch_add(1);
        }
        wake_.notify_all();
        take();
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // whoever has not begun by now need not
        if (active_.load() == 0) return true;
        lock.unlock();
        spin([this] { return active_.load() == 0; });
        lock.lock();
        done_.wait(lock, [this] { return active_.load() == 0; });
        return true;
    }

private:
    void take() {
        for (size_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i);
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            spin([&] { return round_.load() != seen; });
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return round_.load() != seen; });
            seen = round_.load();
            if (!seats_) continue;
            seats_--;
            active_.fetch_add(1);
            lock.unlock();
            take();
            lock.lock();
            if (active_.fetch_sub(1) == 1) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<uint64_t> round_{0};
    std::atomic<size_t> next_{0}, active_{0};
    const std::function<void(size_t)>* task_ = nullptr;
    size_t count_ = 0, seats_ = 0;
};

Pool& pool() {
    // Threads do not survive fork: a child starts its own pool. Never destroyed, as detached threads wait in it.
    struct Owned {
        pid_t pid;
        Pool pool;
    };
    static std::atomic<Owned*> current{nullptr};
    Owned* owned = current.load();
    while (!owned || owned->pid != getpid()) {
        Owned* fresh = new Owned{getpid(), Pool(all_cores() - 1)};
        if (current.compare_exchange_strong(owned, fresh)) owned = fresh;  // else: a few idle threads are left over
    }
    return owned->pool;
}

}  // namespace

size_t cores() {
    const size_t most = limit.load(std::memory_order_relaxed), there = all_cores();
    return most && most < there ? most : there;
}

void limit_threads(size_t n) { limit.store(n, std::memory_order_relaxed); }

size_t threads_for(size_t work, size_t each) { return std::clamp<size_t>(work / each, 1, cores()); }

void parallel(size_t count, size_t threads, const std::function<void(size_t)>& task) {
    const size_t most = threads ? std::min(threads, cores()) : cores();
    const size_t useful = most < count ? most : count;
    if (useful > 1 && pool().run(count, useful, task)) return;
    for (size_t i = 0; i < count; i++) task(i);
}

float* scratch(size_t n) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<float, Free> memory;
    thread_local size_t size = 0;
    if (n > size) {
        const size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        size = memory ? n : 0;
        if (!memory) throw std::bad_alloc();
    }
    return memory.get();
}

}  // namespace slip
