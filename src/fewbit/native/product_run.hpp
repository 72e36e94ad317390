// Running products: which kernel, how many threads, and the memory that they need meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "product.hpp"

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
