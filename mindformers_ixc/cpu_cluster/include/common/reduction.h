// Element-wise reductions of the ranks' buffers, for every type that a tensor can have.
//
// Each rank adds up the same buffers in the same order, so all of them get the same bits.
// 16-bit floats are accumulated in 32 bits and rounded once, as real devices do; integers
// wrap around as numpy's; a NaN of any rank survives max and min, so that a check for
// overflow sees it.
#ifndef MINDFORMERS_IXC_CPU_REDUCTION_H_
#define MINDFORMERS_IXC_CPU_REDUCTION_H_
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>
#if __has_include("base/bfloat16.h")
#include "base/bfloat16.h"
#include "base/float16.h"
#else
#include "mindspore/core/include/base/bfloat16.h"
#include "mindspore/core/include/base/float16.h"
#endif
#include "ir/dtype/type_id.h"

namespace mindspore::cpu_parallel {
enum class Reduce { kSum, kMax, kMin, kProd };

inline bool ParseReduce(const std::string &name, Reduce *out) {
  const char *names[] = {"sum", "max", "min", "prod"};
  for (int i = 0; i < 4; ++i) {
    if (name != names[i]) continue;
    *out = static_cast<Reduce>(i);
    return true;
  }
  return false;
}

template <typename T>
struct IsComplex : std::false_type {};
template <typename T>
struct IsComplex<std::complex<T>> : std::true_type {};

// The type in which buffers of type T are accumulated.
template <typename T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<float16> {
  using type = float;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <>
struct Accumulator<bool> {
  using type = uint8_t;  // std::vector<bool> has no elements to point to
};

// Sum and product; integers by way of uint64_t, whose overflow is defined, unlike theirs.
template <typename A>
A Arithmetic(A a, A b, bool sum) {
  if constexpr (std::is_integral_v<A>) {
    const auto wide_a = static_cast<uint64_t>(a), wide_b = static_cast<uint64_t>(b);
    return static_cast<A>(sum ? wide_a + wide_b : wide_a * wide_b);
  } else {
    return sum ? a + b : a * b;
  }
}

template <typename A>
A Extreme(A a, A b, bool max) {
  if constexpr (std::is_floating_point_v<A>) {
    if (std::isnan(a)) return a;
    if (std::isnan(b)) return b;
  }
  return (max ? b > a : b < a) ? b : a;
}

template <typename T, typename A>
A Combine(A a, A b, Reduce op) {
  if constexpr (std::is_same_v<T, bool>) {  // as numpy: sum and max are "any", product and min are "all"
    return op == Reduce::kSum || op == Reduce::kMax ? a | b : a & b;
  } else if constexpr (IsComplex<A>::value) {
    return Arithmetic(a, b, op == Reduce::kSum);
  } else {
    return op == Reduce::kSum || op == Reduce::kProd ? Arithmetic(a, b, op == Reduce::kSum)
                                                     : Extreme(a, b, op == Reduce::kMax);
  }
}

class Reducer {
 public:
  virtual ~Reducer() = default;
  virtual void Add(const void *part) = 0;
  virtual void Store(void *out) const = 0;
};

template <typename T>
class TypedReducer : public Reducer {
  using A = typename Accumulator<T>::type;

 public:
  TypedReducer(Reduce op, size_t bytes) : op_(op), total_(bytes / sizeof(T)) {}
  void Add(const void *part) override {
    const T *source = static_cast<const T *>(part);
    for (size_t i = 0; i < total_.size(); ++i) {
      const A value = static_cast<A>(source[i]);
      total_[i] = first_ ? value : Combine<T>(total_[i], value, op_);
    }
    first_ = false;
  }
  void Store(void *out) const override {
    T *target = static_cast<T *>(out);
    for (size_t i = 0; i < total_.size(); ++i) target[i] = static_cast<T>(total_[i]);
  }

 private:
  Reduce op_;
  std::vector<A> total_;
  bool first_{true};
};

// Null when the type has no such reduction.
inline std::unique_ptr<Reducer> MakeReducer(TypeId type, Reduce op, size_t bytes) {
  const bool arithmetic = op == Reduce::kSum || op == Reduce::kProd;  // no complex number is the greatest
  switch (type) {
    case kNumberTypeBool: return std::make_unique<TypedReducer<bool>>(op, bytes);
    case kNumberTypeInt8: return std::make_unique<TypedReducer<int8_t>>(op, bytes);
    case kNumberTypeInt16: return std::make_unique<TypedReducer<int16_t>>(op, bytes);
    case kNumberTypeInt32: return std::make_unique<TypedReducer<int32_t>>(op, bytes);
    case kNumberTypeInt64: return std::make_unique<TypedReducer<int64_t>>(op, bytes);
    case kNumberTypeUInt8: return std::make_unique<TypedReducer<uint8_t>>(op, bytes);
    case kNumberTypeUInt16: return std::make_unique<TypedReducer<uint16_t>>(op, bytes);
    case kNumberTypeUInt32: return std::make_unique<TypedReducer<uint32_t>>(op, bytes);
    case kNumberTypeUInt64: return std::make_unique<TypedReducer<uint64_t>>(op, bytes);
    case kNumberTypeFloat16: return std::make_unique<TypedReducer<float16>>(op, bytes);
    case kNumberTypeBFloat16: return std::make_unique<TypedReducer<bfloat16>>(op, bytes);
    case kNumberTypeFloat32: return std::make_unique<TypedReducer<float>>(op, bytes);
    case kNumberTypeFloat64: return std::make_unique<TypedReducer<double>>(op, bytes);
    case kNumberTypeComplex64:
      return arithmetic ? std::make_unique<TypedReducer<std::complex<float>>>(op, bytes) : nullptr;
    case kNumberTypeComplex128:
      return arithmetic ? std::make_unique<TypedReducer<std::complex<double>>>(op, bytes) : nullptr;
    default: return nullptr;
  }
}
}  // namespace mindspore::cpu_parallel
#endif  // MINDFORMERS_IXC_CPU_REDUCTION_H_
