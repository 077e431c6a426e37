// The Python module, subject by subject: functions over numpy arrays, without copies, GIL released. `_native.pyi`
// declares all of it for type checkers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isas.h"
#include "pool.h"

namespace slip {

void bind_product(nanobind::module_& m);
void bind_exchange(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_records(nanobind::module_& m);
void bind_waiting(nanobind::module_& m);

}  // namespace slip

using namespace nanobind::literals;

NB_MODULE(_native, m) {
    nanobind::set_leak_warnings(false);  // a server that ends does not take its model apart first
    m.def("isas", &slip::isas);
    m.def("threads", &slip::cores);
    m.def("limit_threads", &slip::limit_threads, "n"_a);
    slip::bind_product(m);
    slip::bind_exchange(m);
    slip::bind_decoder(m);
    slip::bind_records(m);
    slip::bind_waiting(m);
}
