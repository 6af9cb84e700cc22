// From logits to token ids, a row at a time, without sorting the vocabulary.

#pragma once

#include "sostenuto.h"
#include "team.h"

namespace sostenuto {

void sample(Member& me, const sostenuto_sampling& sampling);

}  // namespace sostenuto
