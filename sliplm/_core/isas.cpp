#include "isas.h"

#include <stdexcept>

namespace slip {

#if defined(__x86_64__)
extern const Isa kAvx512, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Isa kI8mm, kDotprod;
#endif
extern const Isa kScalar;

namespace {

const Isa* const kIsas[] = {// best first
#if defined(__x86_64__)
                            &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
                            &kI8mm, &kDotprod,
#endif
                            &kScalar};

const Isa& find(const std::string& name) {
    for (const Isa* isa : kIsas)
        if ((name.empty() || name == isa->name) && isa->supported()) return *isa;
    throw std::invalid_argument("this machine cannot run the instruction set " + name);
}

}  // namespace

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa* isa : kIsas)
        if (isa->supported()) names.emplace_back(isa->name);
    return names;
}

const Isa& named(const std::string& name) {
    static const Isa& best = find("");
    return name.empty() ? best : find(name);
}

}  // namespace slip
