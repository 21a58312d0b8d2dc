// The Python side of both libraries: what a step prepared for a thousand parameters asks of each of them, in one call.
#include <Python.h>

// DLPack's own header, which torch ships among those without a stable ABI; this one has its own.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include "arguments.h"

namespace srpo {
namespace {

PyObject *tensor_type, *grad;
DLPackDLTensorFromPyObjectNoSync describe;  // where a tensor is and how it is laid out

// same(objects, lists, state): whether `objects` are what `lists` hold, then every key of `state` and its values.
PyObject* same(PyObject*, PyObject* arguments) {
  PyObject *objects, *lists, *state, *key, *values, *name, *value;
  if (!PyArg_ParseTuple(arguments, "O!O!O!", &PyList_Type, &objects, &PyList_Type, &lists, &PyDict_Type, &state))
    return nullptr;
  const Py_ssize_t count = PyList_Size(objects);
  Py_ssize_t next = 0, at = 0;
  const auto is_next = [&](PyObject* found) { return next < count && PyList_GetItem(objects, next++) == found; };
  for (Py_ssize_t i = 0; i < PyList_Size(lists); ++i) {
    PyObject* const list = PyList_GetItem(lists, i);
    if (!PyList_Check(list)) Py_RETURN_FALSE;
    for (Py_ssize_t inner = 0; inner < PyList_Size(list); ++inner)
      if (!is_next(PyList_GetItem(list, inner))) Py_RETURN_FALSE;
  }
  while (PyDict_Next(state, &at, &key, &values)) {
    if (!is_next(key) || !PyDict_Check(values)) Py_RETURN_FALSE;
    for (Py_ssize_t inner = 0; PyDict_Next(values, &inner, &name, &value);)
      if (!is_next(value)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(next == count);
}

bool fits(const DLTensor& gradient, const Item& item) {
  const bool brain = item.gradient == Gradient::kBf16;
  const int bits = item.gradient == Gradient::kFp32 ? 32 : 16;
  if (gradient.dtype.code != (brain ? kDLBfloat : kDLFloat) || gradient.dtype.bits != bits) return false;
  int64_t elements = 1;
  bool contiguous = true;
  for (int i = gradient.ndim - 1; i >= 0; elements *= gradient.shape[i--])
    contiguous = contiguous && (gradient.shape[i] == 1 || !gradient.strides || gradient.strides[i] == elements);
  const int64_t rows = gradient.ndim > 0 ? gradient.shape[0] : 1;
  return rows == item.shard.rows && elements == rows * item.shard.columns && (contiguous || elements == 0);
}

// locate(parameters, plan): notes in a plan where the gradients of its parameters are. False if those are not plain
// tensors as planned, or a parameter is not where it was.
PyObject* locate(PyObject*, PyObject* arguments) {
  PyObject *parameters, *plan;
  if (!PyArg_ParseTuple(arguments, "O!O", &PyList_Type, &parameters, &plan)) return nullptr;
  DLTensor words, weight, gradient;
  if (describe(plan, &words)) return nullptr;
  if (words.ndim != 2 || words.shape[0] != PyList_Size(parameters) || words.shape[1] != kPlanned)
    return PyErr_Format(PyExc_ValueError, "locate: plan is not that of %zd parameters", PyList_Size(parameters));
  Planned* planned = static_cast<Planned*>(words.data);
  for (int64_t i = 0; i < words.shape[0]; ++i) {
    PyObject* const parameter = PyList_GetItem(parameters, Py_ssize_t(i));
    PyObject* const found = PyObject_GetAttr(parameter, grad);
    if (!found) return nullptr;
    Item& item = planned[i].item;
    const bool as_planned = reinterpret_cast<PyObject*>(Py_TYPE(found)) == tensor_type &&
                            describe(found, &gradient) == 0 && fits(gradient, item) &&
                            describe(parameter, &weight) == 0 && weight.data == item.pointer[kWeight];
    Py_DECREF(found);
    if (!as_planned) {
      PyErr_Clear();  // what cannot be described, a sparse tensor, is not as planned either
      Py_RETURN_FALSE;
    }
    item.pointer[kGradient] = gradient.data;
  }
  Py_RETURN_TRUE;
}

PyMethodDef kMethods[] = {{"same", same, METH_VARARGS, nullptr}, {"locate", locate, METH_VARARGS, nullptr}, {}};

// Finds torch's table of C functions that https://dmlc.github.io/dlpack specifies.
bool find_torch() {
  PyObject* const torch = PyImport_ImportModule("torch");
  tensor_type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* const capsule = tensor_type ? PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__") : nullptr;
  const void* const table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  grad = PyUnicode_InternFromString("grad");
  if (!table || !grad) return false;
  const auto* const exchange = static_cast<const DLPackExchangeAPI*>(table);
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION) {
    PyErr_SetString(PyExc_ImportError, "torch's DLPack has another major version than that this was built for");
    return false;
  }
  describe = exchange->dltensor_from_py_object_no_sync;
  return true;
}

}  // namespace
}  // namespace srpo

#define SRPO_JOIN(a, b) a##b
#define SRPO_INIT(name) SRPO_JOIN(PyInit_, name)
PyMODINIT_FUNC SRPO_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "srpo_kernels", nullptr, -1, srpo::kMethods};
  return srpo::find_torch() ? PyModule_Create(&definition) : nullptr;
}
