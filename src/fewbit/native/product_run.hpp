// Running products: which kernel, how many threads, and the memory that they need meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "product.hpp"
#include "rotate.hpp"

namespace fewbit {

// A piece of memory that only grows: what was in it is lost when it does. Begins where a line of the cache begins.
template <class T>
class Buffer {
public:
    T* at_least(size_t count) {
        if (count > size_) {
            memory_.reset();
            size_ = 0;
            const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            if (!memory_) throw std::bad_alloc();
            size_ = count;
        }
        return memory_.get();
    }

    T* data() { return memory_.get(); }

private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    size_t size_ = 0;
};

// Quantized inputs of products: `stride` columns per token, of which a product may read the first ones alone.
class QuantizedInputs {
public:
    void at_least(int64_t tokens, int64_t stride, int64_t group) {
        stride_ = stride;
        group_ = group;
        q_.at_least(static_cast<size_t>(tokens * stride));
        scale_.at_least(static_cast<size_t>(tokens * (stride / group)));
        sums_.at_least(static_cast<size_t>(tokens * (stride / group)));
    }

    // Quantizes into the columns from `first` on, which begin a scale group.
    void quantize(RotateJob job, int64_t tokens, int64_t first = 0) {
        job.q = q_.data() + first;
        job.scale = scale_.data() + first / group_;
        job.sums = sums_.data() + first / group_;
        job.stride = stride_;
        rotate(job, tokens);
    }

    void set(ProductJob& job) {
        job.q = q_.data();
        job.input_scale = scale_.data();
        job.sums = sums_.data();
        job.stride = stride_;
    }

private:
    Buffer<int8_t> q_;
    Buffer<float> scale_;
    Buffer<int32_t> sums_;
    int64_t stride_ = 0, group_ = 0;
};

// What products need beside their jobs; kept from one call to the next, nothing is allocated once it is large enough.
class ProductMemory {
public:
    ProductScratch& operator[](int worker) { return scratches_.data()[worker]; }

    void scratches(int threads, size_t scales_each, size_t more_each);
    int8_t* packed(size_t bytes) { return packed_.at_least(bytes); }

private:
    Buffer<ProductScratch> scratches_;
    Buffer<uint16_t> scales_;
    Buffer<int8_t> more_, packed_;
};

// Products of one input with one or several matrices, their row groups shared out among the threads. The jobs' fields
// for packed inputs are filled in here.
void multiply(ProductJob* jobs, int count, ProductMemory& memory);

// Multiplies on registers with all threads, see PeakKernel: at least so many operations; gives how many.
int64_t multiply_registers(int64_t operations);

}  // namespace fewbit
