/// CUDA C++ for a host compiler: kernels run on the CPU, one block after the other, each thread of a block as a fiber.
///
/// It shows missing barriers and waits, wrong masks and shuffles, deadlocks, and with a sanitizer every access outside
/// an array. It does not show what the memory model allows between blocks, nor bank conflicts and speed; a loop that
/// waits for another thread's write never ends.
#pragma once
#include "emulator/arithmetic.h"
#include "emulator/atomics.h"
#include "emulator/block.h"
#include "emulator/collectives.h"
#include "emulator/language.h"
#include "emulator/launch.h"
