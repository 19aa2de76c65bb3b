// What planted_bugs_module.cpp gives to Python of planted_bugs.cu.
#pragma once
#include <cstddef>

typedef void (*PlantedKernel)(const float* x, float* y, int* counter, int n);

struct PlantedBug {
  const char* name;
  PlantedKernel kernel;
};
extern const PlantedBug kPlantedBugs[];
extern const int kNumPlantedBugs;

// Returns a cudaError_t. `grid` and `block` have three numbers each.
int launch_planted_bug(PlantedKernel kernel, const float* x, float* y, int* counter, int n, const unsigned* grid,
                       const unsigned* block, size_t shared_bytes);
int planted_memset(void* memory, size_t bytes);
