// The instruction sets there are, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "core.h"

namespace slip {

std::vector<std::string> isas();  // those this machine can run, best first

const Isa& named(const std::string& name);  // the best one if `name` is empty; throws if it cannot run here

}  // namespace slip
