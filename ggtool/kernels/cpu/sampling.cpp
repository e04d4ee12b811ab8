// The next token drawn from a row of logits: ggtool/serve/engine/sampler.py has the same steps in numpy, and says what they are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 64 * kLanes;  // a block is the floats of one lane in a group

// The compiler makes them of whatever vectors the CPU has.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Masks __attribute__((vector_size(4 * kLanes)));

struct Candidate {
  float value;
  int64_t id;
};

bool comes_first(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The largest of each block of a group, into maxima (kLanes,); false where a value is no number.
bool find_maxima(const float* group, float* maxima) {
  Floats largest;
  for (int64_t lane = 0; lane < kLanes; ++lane) largest[lane] = -INFINITY;
  Masks wrong = {};
  for (int64_t at = 0; at < kGroup; at += kLanes) {
    Floats values;
    std::memcpy(&values, group + at, sizeof values);
    wrong |= values != values;
    largest = values > largest ? values : largest;
  }
  std::memcpy(maxima, &largest, sizeof largest);
  int32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= wrong[lane];
  return any == 0;
}

void add_reaching(const float* row, int64_t first, int64_t last, int64_t step, float bound, std::vector<Candidate>* found) {
  for (int64_t id = first; id < last; id += step) {
    if (row[id] >= bound) found->push_back({row[id], id});
  }
}

// The k largest, largest first, of equal ones the lower id first; nothing where a value is no number. The maxima of blocks give a
// bound that at least k values reach, so that only the blocks that reach it are looked at.
std::vector<Candidate> find_largest(const float* row, int64_t n, int64_t k) {
  const int64_t n_groups = n / kGroup, n_blocks = n_groups * kLanes;
  std::vector<float> maxima(n_blocks);
  bool sound = true;
  for (int64_t group = 0; group < n_groups; ++group) sound &= find_maxima(row + group * kGroup, &maxima[group * kLanes]);
  for (int64_t id = n_groups * kGroup; id < n; ++id) sound &= row[id] == row[id];
  std::vector<Candidate> found;
  if (!sound) return found;
  float bound = -INFINITY;
  if (n_blocks > k) {
    std::vector<float> sorted(maxima);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    bound = sorted[k - 1];
  }
  for (int64_t block = 0; block < n_blocks; ++block) {
    if (maxima[block] < bound) continue;
    const int64_t start = block / kLanes * kGroup;
    add_reaching(row, start + block % kLanes, start + kGroup, kLanes, bound, &found);
  }
  add_reaching(row, n_groups * kGroup, n, 1, bound, &found);
  const int64_t n_found = std::min<int64_t>(k, found.size());
  std::partial_sort(found.begin(), found.begin() + n_found, found.end(), comes_first);
  found.resize(n_found);
  return found;
}

// Standard Gumbel noise of a token, by SplitMix64.
double gumbel(uint64_t stream, int64_t id) {
  uint64_t bits = (uint64_t(id) * 0xD1342543DE82EF95u ^ stream) + 0x9E3779B97F4A7C15u;
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
  bits ^= bits >> 31;
  const double uniform = (double(bits >> 11) + 0.5) * 0x1p-53;
  return -std::log(-std::log(uniform));
}

}  // namespace

extern "C" {

// Draw from the top_k largest of row (n,); top_p of 1 and log_min_p of -infinity cut nothing off. The largest where that is infinite,
// -1 where a logit is no number.
int64_t ggtool_draw(const float* row, int64_t n, int64_t top_k, double top_p, double log_min_p, double temperature, uint64_t stream) {
  const std::vector<Candidate> found = find_largest(row, n, top_k);
  if (found.empty()) return -1;
  const double largest = found[0].value;
  if (!std::isfinite(largest)) return found[0].id;
  size_t n_kept = found.size();
  if (top_p < 1) {
    std::vector<double> before(found.size());  // the mass of those that come first
    double mass = 0;
    for (size_t at = 0; at < found.size(); ++at) {
      const double weight = std::exp(double(found[at].value) - largest);
      mass += weight;
      before[at] = mass - weight;
    }
    n_kept = std::lower_bound(before.begin(), before.end(), top_p * mass) - before.begin();
  }
  int64_t best = found[0].id;
  double best_score = -INFINITY;
  for (size_t at = 0; at < n_kept && found[at].value >= largest + log_min_p; ++at) {
    const double score = (double(found[at].value) - largest) / temperature + gumbel(stream, found[at].id);
    if (score > best_score) {
      best_score = score;
      best = found[at].id;
    }
  }
  return best;
}

}  // extern "C"
