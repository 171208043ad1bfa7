// Work is cut into tiles of fixed size, whatever the number of threads: so sums, kept per tile, never change a bit.
#pragma once

#include <cstdint>

namespace hdrq {

constexpr int64_t kChunk = 1024;        // elements that stay in the first-level cache between steps of one kernel
constexpr int64_t kTile = 16 * kChunk;  // elements of one unit of work and of one partial sum

inline int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }

// Calls body(context, tile, begin, end) for every tile, over up to `threads` threads.
void run_tiles(int64_t count, int threads, void (*body)(const void*, int64_t, int64_t, int64_t), const void* context);

}  // namespace hdrq
