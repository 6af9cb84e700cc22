// Log-probabilities of chosen and of the most likely tokens, a row at a time, without those of all others.

#pragma once

#include "sostenuto.h"
#include "team.h"

namespace sostenuto {

void logprobs(Member& me, const sostenuto_logprobs& asked);

}  // namespace sostenuto
