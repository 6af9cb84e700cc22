#include "team.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

namespace sostenuto {

namespace {

constexpr int kSpinsBeforeYield = 4000;  // about 0.1 ms: longer than any wait of a team that has its cores for itself
constexpr auto kIdleBeforeSleep = std::chrono::microseconds(200);  // between calls: sampling, then the next step

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Team::Buffer::~Buffer() { std::free(data); }

void* Team::Buffer::reserve(size_t bytes) {
    if (bytes > size) {
        std::free(data);
        size = (bytes + 63) / 64 * 64;
        data = std::aligned_alloc(64, size);
        if (data == nullptr) throw std::bad_alloc();
    }
    return data;
}

Team::Team(int size) : size_(size), ranges_(new Range[size]), scratch_(size) {
    for (int index = 1; index < size; ++index) workers_.emplace_back([this, index] { work(index); });
}

Team::~Team() {
    {
        std::lock_guard<std::mutex> guard(sleep_lock_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(Member&)>& body) {
    body_ = &body;
    if (size_ > 1) {
        bool anyone_sleeps;
        {
            std::lock_guard<std::mutex> guard(sleep_lock_);
            call_.fetch_add(1, std::memory_order_release);
            anyone_sleeps = sleeping_ > 0;
        }
        if (anyone_sleeps) wake_.notify_all();
    }
    Member caller(*this, 0);
    body(caller);
    if (size_ > 1) meet();  // nobody may still be inside when the caller's frame goes
}

void Team::work(int index) {
    Member member(*this, index);
    for (uint64_t call = 1; wait_for_call(call); ++call) {
        (*body_)(member);
        meet();
    }
}

// Wait until call number `call` begins; false when the team is being dissolved.
bool Team::wait_for_call(uint64_t call) {
    const auto tired = std::chrono::steady_clock::now() + kIdleBeforeSleep;
    do {
        for (int spin = 0; spin < 64; ++spin) {
            if (call_.load(std::memory_order_acquire) >= call) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < tired);
    std::unique_lock<std::mutex> guard(sleep_lock_);
    ++sleeping_;
    wake_.wait(guard, [&] { return stopping_ || call_.load(std::memory_order_acquire) >= call; });
    --sleeping_;
    return call_.load(std::memory_order_acquire) >= call;
}

// A barrier. Its waits are short by construction, so it spins, and yields only when a member has lost its core.
void Team::meet() {
    const uint64_t meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        meeting_.store(meeting + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; meeting_.load(std::memory_order_acquire) == meeting; ++spin) {
        if (spin < kSpinsBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

void* Team::arena(size_t bytes) { return arena_.reserve(bytes); }

void Team::poison() {
    if (arena_.data != nullptr) memset(arena_.data, 0xff, arena_.size);
    for (Buffer& buffer : scratch_)
        if (buffer.data != nullptr) memset(buffer.data, 0xff, buffer.size);
}

void* Member::scratch(size_t bytes) { return team_.scratch_[index_].reserve(bytes); }

}  // namespace sostenuto
