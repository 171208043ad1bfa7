#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace hdrq {

// Threads are started for the call and joined at its end: there is no pool to outlive a fork, and no second OpenMP
// runtime beside torch's.
void run_units(int64_t units, int64_t fewest, int threads, void (*body)(const void*, int64_t), const void* context) {
  const int64_t workers = std::clamp<int64_t>(units / fewest, 1, std::max(threads, 1));
  const auto run = [=](int64_t worker) {
    for (int64_t u = units * worker / workers; u < units * (worker + 1) / workers; ++u) body(context, u);
  };
  std::vector<std::thread> started;
  started.reserve(workers - 1);
  for (int64_t w = 1; w < workers; ++w) started.emplace_back(run, w);
  run(0);
  for (auto& thread : started) thread.join();
}

}  // namespace hdrq
