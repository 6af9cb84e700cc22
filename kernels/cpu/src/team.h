// One team of threads for the library: the caller and `size - 1` workers of our own.
//
// A call runs one function on every member; inside, the members share loops. Work is dealt in contiguous ranges, and
// who is done early takes over from the others: on a machine with neighbours the slowest thread must not set the pace.
// Who computes a task never changes its result. Between calls workers spin briefly, then sleep.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sostenuto {

class Team;

// One thread's view of the team during a call.
class Member {
   public:
    Member(Team& team, int index) : team_(team), index_(index) {}

    int index() const { return index_; }
    Team& team() const { return team_; }

    // Run `task(i)` for every i in [0, count) somewhere in the team; returns when all of them are done. Every member
    // must come by with the same count.
    template <typename Task>
    void share(int64_t count, const Task& task);

    // Memory of this thread's own, 64-byte aligned, valid until the next `scratch`. Contents are undefined.
    void* scratch(size_t bytes);

   private:
    Team& team_;
    const int index_;
};

class Team {
   public:
    explicit Team(int size);
    ~Team();

    int size() const { return size_; }

    // Run `body` on every member; the caller is member 0. One call at a time: a second caller waits.
    void run(const std::function<void(Member&)>& body);

    // Memory shared by the members of a call, 64-byte aligned, valid until the next `arena`. Call it before `run`,
    // under `lock`.
    void* arena(size_t bytes);

    // Fill all scratch memory with NaN: a test's way to catch reads of what was not written.
    void poison();

    std::mutex lock;  // held for the length of a call

   private:
    friend class Member;

    // The tasks a member still has to do: `next` in the low half, `end` in the high half. One word, so that a member
    // who looks early finds either the exhausted range of the last loop or the fresh one, and no barrier is needed.
    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};
    };

    struct Buffer {
        ~Buffer();
        void* reserve(size_t bytes);
        void* data = nullptr;
        size_t size = 0;
    };

    void work(int index);
    void go_home(int index) const;
    bool wait_for_call(uint64_t call);
    void meet();
    template <typename Condition>
    void wait(std::chrono::steady_clock::duration patience, const Condition& done);
    void wake_sleepers();

    const int size_;
    const std::vector<int> homes_;  // a processor for each member, or nothing
    std::vector<std::thread> workers_;
    std::unique_ptr<Range[]> ranges_;
    std::vector<Buffer> scratch_;
    Buffer arena_;

    alignas(64) std::atomic<uint64_t> call_{0};  // counts calls; workers wait for it to rise
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint64_t> meeting_{0};
    const std::function<void(Member&)>* body_ = nullptr;
    std::mutex sleep_lock_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
};

template <typename Task>
void Member::share(int64_t count, const Task& task) {
    const int size = team_.size_;
    if (size == 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    const uint64_t first = count * index_ / size, end = count * (index_ + 1) / size;
    team_.ranges_[index_].word.store(end << 32 | first, std::memory_order_relaxed);
    for (int offset = 0; offset < size; ++offset) {
        std::atomic<uint64_t>& range = team_.ranges_[(index_ + offset) % size].word;
        for (;;) {
            const uint64_t word = range.fetch_add(1, std::memory_order_relaxed);
            const uint32_t i = static_cast<uint32_t>(word);
            if (i >= word >> 32) break;
            task(static_cast<int64_t>(i));
        }
    }
    team_.meet();
}

}  // namespace sostenuto
