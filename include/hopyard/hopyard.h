// SPDX-License-Identifier: Apache-2.0
// Hopyard: fused Mixture-of-Experts layers for LLM inference. Includes the whole public API.
#pragma once

#include "hopyard/checkpoint.h"
#include "hopyard/device.h"
#include "hopyard/error.h"
#include "hopyard/forward.h"
#include "hopyard/permute.h"
#include "hopyard/plan.h"
#include "hopyard/quantize.h"
#include "hopyard/routing.h"
#include "hopyard/spec.h"
#include "hopyard/tensor.h"
#include "hopyard/tune.h"
#include "hopyard/weights.h"

#define HOPYARD_VERSION "0.1.0"
