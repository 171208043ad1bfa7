#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace hdrq {

namespace {
constexpr int64_t kTilesPerThread = 8;  // fewer are not worth starting a thread for
}

// Threads are started for the call and joined at its end: there is no pool to outlive a fork, and no second OpenMP
// runtime beside torch's.
void run_tiles(int64_t count, int threads, void (*body)(const void*, int64_t, int64_t, int64_t), const void* context) {
  const int64_t total = tiles(count);
  const int64_t workers = std::clamp<int64_t>(total / kTilesPerThread, 1, std::max(threads, 1));
  const auto run = [=](int64_t worker) {
    for (int64_t t = total * worker / workers; t < total * (worker + 1) / workers; ++t)
      body(context, t, t * kTile, std::min((t + 1) * kTile, count));
  };
  std::vector<std::thread> started;
  started.reserve(workers - 1);
  for (int64_t w = 1; w < workers; ++w) started.emplace_back(run, w);
  run(0);
  for (auto& thread : started) thread.join();
}

}  // namespace hdrq
