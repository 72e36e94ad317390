// Running products: which kernel, how many threads, and the memory that they need meanwhile.
#include "product_run.hpp"

#include <algorithm>

#include "cpu.hpp"
#include "rotate.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

constexpr int64_t kWorkOfAThread = 1 << 19;       // products worth waking another thread for

int64_t row_groups(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The jobs' units of work (row groups or panels) counted through.
class Units {
public:
    Units(const ProductJob* jobs, int count, int panel) : jobs_(jobs), panel_(panel) {
        for (int i = 0; i < count; ++i) count_ += of(jobs[i]);
    }

    int64_t count() const { return count_; }

    template <class Body>
    void at(int64_t unit, const Body& body) const {
        const ProductJob* job = jobs_;
        for (; unit >= of(*job); ++job) unit -= of(*job);
        body(*job, unit);
    }

private:
    int64_t of(const ProductJob& job) const { return (row_groups(job.rows) + panel_ - 1) / panel_; }

    const ProductJob* jobs_;
    int panel_;
    int64_t count_ = 0;
};

// Panels of a unit of work: several where the kernels gain from that, if every thread gets enough units all the same.
int panels_for(const PanelKernels& use, int64_t rows, int threads) {
    const int64_t panels = rows / (use.panel * kTileRows) / (threads * kPiecesPerThread);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(panels, use.panels)));
}

// Packs the inputs that all jobs share.
void pack(ProductJob* jobs, int count, const PanelKernels& use, int threads, int64_t rows, ProductMemory& memory) {
    const int64_t tokens = jobs[0].tokens, cols = jobs[0].cols, blocks = (tokens + use.block - 1) / use.block;
    const int64_t bytes = blocks * use.block * (use.bytes * cols + 4 * (cols / jobs[0].group));
    int8_t* packed = memory.packed(static_cast<size_t>(bytes));
    for (int i = 0; i < count; ++i) {
        jobs[i].packed = packed;
        jobs[i].panels = panels_for(use, rows, threads);
    }
    run(threads_for(tokens * cols, kTokenWork), blocks, [&](int64_t block, int) { use.pack(jobs[0], block); });
}

}  // namespace

void ProductMemory::scratches(int threads, size_t scales_each, size_t more_each) {
    // Each thread's part begins with a line of the cache.
    scales_each = (scales_each + 31) / 32 * 32;
    more_each = (more_each + 63) / 64 * 64;
    ProductScratch* scratch = scratches_.at_least(static_cast<size_t>(threads));
    uint16_t* scales = scales_.at_least(static_cast<size_t>(threads) * scales_each);
    int8_t* more = more_.at_least(static_cast<size_t>(threads) * more_each);
    for (int i = 0; i < threads; ++i) {
        scratch[i].scales = scales + static_cast<size_t>(i) * scales_each;
        scratch[i].more = more + static_cast<size_t>(i) * more_each;
    }
}

void multiply(ProductJob* jobs, int count, ProductMemory& memory) {
    const int64_t tokens = jobs[0].tokens, cols = jobs[0].cols;
    if (tokens == 0) return;
    const ProductKernels* all = kernels().product;
    const ProductKernels& use = jobs[0].group % all->columns == 0 ? *all : *all->otherwise;
    int64_t rows = 0;
    bool in_lanes = tokens <= use.most_in_lanes;
    for (int i = 0; i < count; ++i) {
        rows += jobs[i].rows;
        in_lanes = in_lanes && jobs[i].code == Code::lanes && jobs[i].lane_groups == use.lanes.panel;
    }
    const int threads = threads_for(tokens * rows * cols, kWorkOfAThread);
    const PanelKernels& panels = in_lanes ? use.lanes : use.panels;
    const bool few = !in_lanes && tokens <= use.few;
    const int64_t scales = cols / jobs[0].group * std::max(kMaxPanel, kMaxLaneGroups) * kTileRows;
    memory.scratches(threads, static_cast<size_t>(scales), few ? 0 : panels.scratch);
    if (!few) pack(jobs, count, panels, threads, rows, memory);
    const Units units(jobs, count, few ? 1 : panels.panel * jobs[0].panels);
    run(threads, units.count(), [&](int64_t unit, int worker) {
        units.at(unit, [&](const ProductJob& job, int64_t index) {
            (few ? use.multiply_few : panels.multiply)(job, index, memory[worker]);
        });
    });
}

int64_t multiply_registers(int64_t operations) {
    const PeakKernel& peak = kernels().product->peak;
    const int threads = num_threads();
    const int64_t pieces = threads * kPiecesPerThread, all = pieces * peak.operations;
    const int64_t steps = (operations + all - 1) / all;
    parallel_for(threads, pieces, [&](int64_t, int) { peak.multiply(steps); });
    return steps * all;
}

}  // namespace fewbit
