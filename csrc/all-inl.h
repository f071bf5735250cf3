// Everything that is compiled once per ISA, inside that ISA's namespace and after its target
// pragma. No standard header may be included from here on: its inline functions would be compiled
// for the ISA and could replace those of the whole program.

#include "numerics-inl.h"
#include "passes-inl.h"

#include "window-inl.h"

#include "select-inl.h"

#include "pieces-inl.h"

#include "row-inl.h"

#include "edits-inl.h"

#include "shapes-inl.h"

#include "kept-inl.h"

#include "filters-inl.h"

#include "draw-inl.h"
#include "log_odds-inl.h"
#include "score-inl.h"

#include "verify-inl.h"

#include "slice-inl.h"

#include "logits-inl.h"

#include "divergence-inl.h"
#include "label-inl.h"
#include "tile-inl.h"

#include "table-inl.h"
