// Work is cut into tiles of fixed size, whatever the number of threads: so sums, kept per tile, never change a bit.
#pragma once

#include <cstdint>

namespace hdrq {

constexpr int64_t kChunk = 1024;        // elements that stay in the first-level cache between steps of one kernel
constexpr int64_t kDraw = kChunk / 4;   // elements drawn for at once: few, so that reading the next goes on meanwhile
constexpr int64_t kTile = 16 * kChunk;  // elements of one unit of work and of one partial sum
constexpr int64_t kTilesPerThread = 2;  // fewer are not worth waking a thread for

inline int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }

// Calls body(context, unit) for every unit of work, over up to `threads` threads of at least `fewest` units each.
void run_units(int64_t units, int64_t fewest, int threads, void (*body)(const void*, int64_t), const void* context);

}  // namespace hdrq
