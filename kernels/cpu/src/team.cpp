#include "team.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sched.h>
#endif

namespace sostenuto {

namespace {

using Clock = std::chrono::steady_clock;

// How long a thread spins before it sleeps. Within a call: longer than most waits of a team that has its cores to
// itself; one that waits longer has a neighbour on its core, and an idle core is what brings a displaced member back.
constexpr auto kPatience = std::chrono::microseconds(2000);
constexpr auto kPatienceBetweenCalls = std::chrono::microseconds(200);  // sampling, then the next step

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until `done`, for so long at most; says whether it came true.
template <typename Condition>
bool spin(Clock::duration patience, const Condition& done) {
    const auto tired = Clock::now() + patience;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < tired);
    return false;
}

#if defined(__linux__)
// The processors this thread may use, one for each member; none if there are more or fewer.
std::vector<int> find_homes(int size) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != size) return {};
    std::vector<int> homes;
    for (int processor = 0; processor < CPU_SETSIZE; ++processor)
        if (CPU_ISSET(processor, &allowed)) homes.push_back(processor);
    return homes;
}

// Move this thread to a processor. Where it runs later stays open.
void move_to(int processor) {
    if (sched_getcpu() == processor) return;
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0 && sched_setaffinity(0, sizeof one, &one) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
std::vector<int> find_homes(int) { return {}; }
void move_to(int) {}
#endif

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

Team::Team(int size) : size_(size), homes_(find_homes(size)), ranges_(new Range[size]), scratch_(size) {
    for (int index = 1; index < size; ++index) workers_.emplace_back([this, index] { work(index); });
}

Team::~Team() {
    stopping_.store(true);
    wake_sleepers();
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(Member&)>& body) {
    body_ = &body;
    go_home(0);
    call_.fetch_add(1);
    wake_sleepers();
    Member caller(*this, 0);
    body(caller);
    if (size_ > 1) meet();  // nobody may still be inside when the caller's frame goes
}

void Team::work(int index) {
    Member member(*this, index);
    for (uint64_t call = 1; wait_for_call(call); ++call) {
        go_home(index);
        (*body_)(member);
        meet();
    }
}

// Wait until call number `call` begins; false when the team is being dissolved.
bool Team::wait_for_call(uint64_t call) {
    wait(kPatienceBetweenCalls, [&] { return stopping_.load() || call_.load() >= call; });
    return call_.load() >= call;
}

// A team as large as the machine needs all of it. But the system wakes a member beside its waker if somebody, of however
// low a priority, has its core, and leaves it there: each would get half a core, and all be slower than one thread alone.
void Team::go_home(int index) const {
    if (!homes_.empty()) move_to(homes_[index]);
}

// A barrier.
void Team::meet() {
    const uint64_t meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        meeting_.store(meeting + 1);
        wake_sleepers();
    } else {
        wait(kPatience, [&] { return meeting_.load() != meeting; });
    }
}

// Whoever makes a condition true stores it first and looks for sleepers then; whoever goes to sleep counts itself first
// and looks at the condition then. Both in one total order, so at least one sees the other.
template <typename Condition>
void Team::wait(Clock::duration patience, const Condition& done) {
    if (spin(patience, done)) return;
    std::unique_lock<std::mutex> guard(sleep_lock_);
    sleepers_.fetch_add(1);
    wake_.wait(guard, done);
    sleepers_.fetch_sub(1);
}

void Team::wake_sleepers() {
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> guard(sleep_lock_); }
    wake_.notify_all();
}

void* Team::arena(size_t bytes) { return arena_.reserve(bytes); }

void Team::poison() {
    if (arena_.data != nullptr) memset(arena_.data, 0xff, arena_.size);
    for (Buffer& buffer : scratch_)
        if (buffer.data != nullptr) memset(buffer.data, 0xff, buffer.size);
}

void* Member::scratch(size_t bytes) { return team_.scratch_[index_].reserve(bytes); }

}  // namespace sostenuto
