// The instruction set in use, as an index into each table of variants.
#pragma once

#include <cstdint>

int64_t capability_in_use();
