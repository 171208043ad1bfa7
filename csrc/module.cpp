// The bindings. Tensors come as addresses (see hdrq/native), so that no torch header is needed and one build serves
// every torch version. The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace hdrq {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#ifdef HDRQ_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) tables.push_back(&avx2_kernels());
#endif
  tables.push_back(&portable_kernels());
  return tables;
}

// The instruction set in use: the widest that this machine has, or the one set with use_isa.
const Kernels*& in_use() {
  static const Kernels* kernels = available().front();
  return kernels;
}

std::string use_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : available()) {
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
    if (name == kernels->name) {
      const std::string previous = in_use()->name;
      in_use() = kernels;
      return previous;
    }
  }
  throw std::invalid_argument("isa must be one of " + known + ", got " + name);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct GridArgs {
  uintptr_t scale, zero_point;
  int64_t channels, inner;
  int qmin, qmax;
  operator Grid() const {
    return {at<float>(scale), at<float>(zero_point), channels, inner, float(qmin), float(qmax)};
  }
};

Stream stream_of(uintptr_t rng) {
  const int64_t* state = at<int64_t>(rng);
  return {uint64_t(state[0]), uint32_t(state[1]), uint32_t(state[2])};
}

// Bin b takes t ≥ C[b], t = (word·N) >> 32: word ≥ ceil(C[b]·2^32 / N), so word > that − 1.
Histogram histogram_of(const int64_t* cumulative) {
  Histogram h;
  const uint64_t total = uint64_t(cumulative[Histogram::kBins]);
  h.empty = total == 0;
  if (h.empty) return h;
  uint64_t first[Histogram::kBins];  // the bin's first word; 2^32 where none reaches it
  for (int b = 0; b < Histogram::kBins; ++b) {
    first[b] = uint64_t((((unsigned __int128)cumulative[b] << 32) + total - 1) / total);
    h.last[b] = first[b] == 0 ? 0 : uint32_t(first[b] - 1);
  }
  h.last[Histogram::kBins] = UINT32_MAX;
  int b = 0;
  for (uint64_t cell = 0; cell < std::size(h.guide); ++cell) {
    const uint64_t begin = cell << Histogram::kCellBits, end = begin + Histogram::kCell;
    while (b + 1 < Histogram::kBins && first[b + 1] <= begin) ++b;
    const uint64_t next = b + 1 < Histogram::kBins ? std::min(first[b + 1], end) : end;
    const bool more = b + 2 < Histogram::kBins && first[b + 2] < end;
    h.guide[cell] = uint32_t(b) | uint32_t(next - begin) << 8 | uint32_t(more) << 31;
  }
  return h;
}

struct QuantizerArgs {
  Quantizer quantizer;
  std::unique_ptr<Histogram> histogram;
};

QuantizerArgs quantizer_of(int64_t count, uintptr_t x, uintptr_t scale, uintptr_t zero_point, int64_t channels,
                           int64_t inner, int qmin, int qmax, bool noise, uintptr_t rng, uintptr_t counts,
                           uint32_t threshold, uintptr_t source, int rounding, int gradient) {
  const GridArgs grid{scale, zero_point, channels, inner, qmin, qmax};
  QuantizerArgs args{};
  if (counts) args.histogram = std::make_unique<Histogram>(histogram_of(at<int64_t>(counts)));
  const Stream stream = rng ? stream_of(rng) : Stream{};
  args.quantizer = {count, at<void>(x), grid, noise, stream, args.histogram.get(), threshold, at<void>(source),
                    Rounding(rounding), Gradient(gradient)};
  return args;
}

struct MergeArgs {
  std::vector<Code> types;
  std::vector<const void*> codes;
  std::vector<const float*> scales, zero_points;
  std::vector<float> weights;
  Merge rest;
  Merge view() const {
    Merge merge = rest;
    merge.types = types.data(), merge.codes = codes.data(), merge.weights = weights.data();
    merge.scales = scales.data(), merge.zero_points = zero_points.data();
    return merge;
  }
};

// Asks for 2 MiB pages under a result that is about to be written: its first touch costs a page fault per 4 KiB
// otherwise, several times the kernel itself. A hint; where there is no such thing, nothing happens.
void expect_writes(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

using Released = py::call_guard<py::gil_scoped_release>;

void bind(py::module_& m) {
  py::class_<GridArgs>(m, "Grid").def(
      py::init([](uintptr_t scale, uintptr_t zero_point, int64_t channels, int64_t inner, int qmin, int qmax) {
        return GridArgs{scale, zero_point, channels, inner, qmin, qmax};
      }));
  py::class_<Job>(m, "Job").def(py::init([](int64_t count, int threads) { return Job{count, threads}; }));

  m.def("isa", [] { return in_use()->name; }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
  }, "The instruction sets that run on this machine, widest first.");
  m.def("use_isa", &use_isa, "Use one of isas(); returns the one used before. No choice changes a bit.");

  m.def("expect_writes", &expect_writes, "Says that `bytes` of memory at `address` are about to be written.");

  py::class_<QuantizerArgs>(m, "Quantizer").def(py::init(&quantizer_of));
  m.def("quantizer_forward", [](int threads, int f, const std::vector<const QuantizerArgs*>& list,
                                const std::vector<uintptr_t>& y) {
    std::vector<Quantizer> quantizers;
    std::vector<double> squares(list.size());
    for (size_t k = 0; k < list.size(); ++k) {
      quantizers.push_back(list[k]->quantizer);
      quantizers[k].y = at<void>(y[k]), quantizers[k].squared_distance = &squares[k];
    }
    in_use()->quantizer_forward(threads, Float(f), quantizers.data(), int(list.size()));
    return squares;
  }, Released());
  m.def("quantizer_backward", [](int threads, int f, const std::vector<const QuantizerArgs*>& list,
                                 const std::vector<uintptr_t>& grad, const std::vector<uintptr_t>& grad_x,
                                 const std::vector<uintptr_t>& grad_s, const std::vector<uintptr_t>& grad_z,
                                 const std::vector<double>& factor, const std::vector<float>& pull) {
    std::vector<Quantizer> quantizers;
    std::vector<std::vector<double>> sums, zero_sums(grad_z.size());
    for (const QuantizerArgs* each : list) sums.emplace_back(each->quantizer.grid.channels);
    for (size_t k = 0; k < grad_z.size(); ++k) zero_sums[k].resize(sums[k].size());
    for (size_t k = 0; k < list.size(); ++k) {
      quantizers.push_back(list[k]->quantizer);
      quantizers[k].grad = at<void>(grad[k]), quantizers[k].grad_x = at<void>(grad_x[k]);
      quantizers[k].grad_s = sums[k].data(), quantizers[k].pull = pull[k];
      if (!grad_z.empty()) quantizers[k].grad_z = zero_sums[k].data();
    }
    in_use()->quantizer_backward(threads, Float(f), quantizers.data(), int(list.size()));
    const auto give = [&](const std::vector<std::vector<double>>& from, const std::vector<uintptr_t>& to) {
      for (size_t k = 0; k < to.size(); ++k)
        for (size_t c = 0; c < from[k].size(); ++c) at<float>(to[k])[c] = float(from[k][c] * factor[k]);
    };
    give(sums, grad_s);
    give(zero_sums, grad_z);
  }, Released());
  m.def("error_histogram", [](Job j, int f, uintptr_t x, uintptr_t counts, const GridArgs& g) {
    in_use()->error_histogram(j, Float(f), at<void>(x), at<int64_t>(counts), g);
  }, Released());

  m.def("quantize", [](Job j, int f, uintptr_t x, int code, uintptr_t codes, const GridArgs& g) {
    return in_use()->quantize(j, Float(f), at<void>(x), Code(code), at<void>(codes), g);
  }, Released());
  m.def("dequantize", [](Job j, int code, uintptr_t codes, uintptr_t y, const GridArgs& g) {
    in_use()->dequantize(j, Code(code), at<void>(codes), at<float>(y), g);
  }, Released());

  m.def("drop_mix", [](Job j, int f, uintptr_t a, uintptr_t b, uintptr_t y, uint32_t threshold, uintptr_t rng) {
    in_use()->drop_mix(j, Float(f), at<void>(a), at<void>(b), at<void>(y), threshold, stream_of(rng));
  }, Released());
  m.def("drop_mix_backward", [](Job j, int f, uintptr_t grad, uintptr_t grad_a, uintptr_t grad_b, uint32_t threshold,
                                uintptr_t rng) {
    in_use()->drop_mix_backward(j, Float(f), at<void>(grad), at<void>(grad_a), at<void>(grad_b), threshold,
                                stream_of(rng));
  }, Released());

  m.def("squared_distance", [](Job j, int f, uintptr_t w, uintptr_t w_src) {
    return in_use()->squared_distance(j, Float(f), at<void>(w), at<void>(w_src));
  }, Released());
  m.def("scaled_difference", [](Job j, int f, uintptr_t w, uintptr_t w_src, uintptr_t y, float factor) {
    in_use()->scaled_difference(j, Float(f), at<void>(w), at<void>(w_src), at<void>(y), factor);
  }, Released());

  m.def("adaround", [](Job j, int f, uintptr_t x, uintptr_t alpha, uintptr_t y, const GridArgs& g, uintptr_t beta,
                       bool hard) {
    return in_use()->adaround(j, Float(f), at<void>(x), at<float>(alpha), at<void>(y), g, at<float>(beta), hard);
  }, Released());
  m.def("adaround_backward", [](Job j, int f, uintptr_t grad, float grad_penalty, uintptr_t x, uintptr_t alpha,
                                uintptr_t grad_alpha, const GridArgs& g, uintptr_t beta) {
    in_use()->adaround_backward(j, Float(f), at<void>(grad), grad_penalty, at<void>(x), at<float>(alpha),
                                at<float>(grad_alpha), g, at<float>(beta));
  }, Released());

  m.def("range_errors", [](int threads, int f, uintptr_t x, uintptr_t weights, int64_t rows, int64_t length,
                           int64_t candidates, uintptr_t scale, uintptr_t low, uintptr_t high, uintptr_t unit,
                           float norm, uintptr_t errors) {
    const RangeSearch search{rows, length, candidates, at<float>(weights), at<float>(scale), at<float>(low),
                             at<float>(high), at<float>(unit), norm};
    in_use()->range_errors(threads, Float(f), at<void>(x), search, at<double>(errors));
  }, Released());
  m.def("range_table", [](int threads, int f, uintptr_t x, int64_t rows, int64_t length, int64_t bins,
                          uintptr_t origin, uintptr_t factor, uintptr_t table) {
    const RangeTable shape{rows, length, bins, at<float>(origin), at<float>(factor)};
    in_use()->range_table(threads, Float(f), at<void>(x), shape, at<int64_t>(table));
  }, Released());

  py::class_<MergeArgs>(m, "Merge")
      .def(py::init([](const std::vector<int>& types, const std::vector<uintptr_t>& codes,
                       const std::vector<uintptr_t>& scales, const std::vector<uintptr_t>& zero_points,
                       std::vector<float> weights, uintptr_t merged_scale, uintptr_t merged_zero, int64_t channels,
                       int64_t inner, int qmin, int qmax, uintptr_t rng, int noise, bool fast) {
        MergeArgs args{{}, {}, {}, {}, std::move(weights), {}};
        for (const int type : types) args.types.push_back(Code(type));
        for (const uintptr_t c : codes) args.codes.push_back(at<void>(c));
        for (const uintptr_t s : scales) args.scales.push_back(at<float>(s));
        for (const uintptr_t z : zero_points) args.zero_points.push_back(at<float>(z));
        Merge& m = args.rest;
        m.models = int(codes.size()), m.merged_scale = at<float>(merged_scale), m.merged_zero = at<float>(merged_zero);
        m.channels = channels, m.inner = inner, m.qmin = float(qmin), m.qmax = float(qmax);
        m.stream = stream_of(rng), m.noise = Merge::Noise(noise), m.fast = fast;
        return args;
      }));
  m.def("merge_score", [](Job j, const MergeArgs& merge, int draws, uintptr_t sums) {
    in_use()->merge_score(j, merge.view(), draws, at<double>(sums));
  }, Released());
  m.def("merge_codes", [](Job j, const MergeArgs& merge, int draw, int code, uintptr_t codes) {
    in_use()->merge_codes(j, merge.view(), draw, Code(code), at<void>(codes));
  }, Released());
  m.def("merge_systematic", [](Job j, const MergeArgs& merge, float tau, int code, uintptr_t codes) {
    in_use()->merge_systematic(j, merge.view(), tau, Code(code), at<void>(codes));
  }, Released());
}

}  // namespace
}  // namespace hdrq

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ path of hdrq, for CPU tensors.";
  hdrq::bind(m);
}
