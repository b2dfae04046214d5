// The instruction-set level in use: the best one that the CPU has, or the one that was set.
#pragma once

#include <string>
#include <vector>

#include "loops.h"

namespace gptfast {

// Returns the loops of the level in use; no pointer in it is null.
const Loops& loops();

// Returns the names of the levels that this CPU has, from the lowest to the best.
std::vector<std::string> supported_levels();

// Returns the names of the levels that emulate the instructions of others, for tests on any CPU.
std::vector<std::string> emulated_levels();

// Returns what the process has of the CPU's matrix engine: "none" without one, "AMX", or "AMX, refused by the system".
std::string matrix_engine();

std::string level_name();

// Takes emulated levels too. Throws std::invalid_argument for a level that this CPU does not have.
void set_level(const std::string& name);

}  // namespace gptfast
