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

std::string level_name();

// Throws std::invalid_argument for a level that this CPU does not have.
void set_level(const std::string& name);

}  // namespace gptfast
