// How structs and functions of the kernels look from Python: pointers are integers or None, enums
// are integers, everything else is what nanobind makes of it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "kernels.h"

namespace corematching {

namespace nb = nanobind;

// The Python side of a T, and back.
template <typename T, bool is_enum = std::is_enum_v<T>>
struct Convert {
  using Python = T;
  static T to_python(T value) { return value; }
  static T to_cpp(T value) { return value; }
};

template <typename T>
struct Convert<T, true> {
  using Python = int;
  static int to_python(T value) { return static_cast<int>(value); }
  static T to_cpp(int value) { return static_cast<T>(value); }
};

template <typename T>
struct Convert<T*, false> {
  using Python = std::optional<std::uintptr_t>;
  static Python to_python(T* value) {
    return value ? Python(reinterpret_cast<std::uintptr_t>(value)) : std::nullopt;
  }
  static T* to_cpp(Python value) { return reinterpret_cast<T*>(value.value_or(0)); }
};

template <typename T>
struct Convert<const T&, false> {
  using Python = const T&;
  static Python to_cpp(Python value) { return value; }
};

// A struct as a Python class, all zero at first.
template <typename S>
class Struct {
 public:
  Struct(nb::module_& module, const char* name) : type_(module, name) {
    type_.def("__init__", [](S* self) { new (self) S{}; });
    type_.def("set", [](nb::handle_t<S> self, const nb::kwargs& fields) {
      for (auto [name, value] : fields) nb::setattr(self, name, value);
      return nb::borrow(self);
    });
  }

  template <typename T>
  Struct& field(const char* name, T S::*member) {
    using C = Convert<T>;
    type_.def_prop_rw(
        name, [member](const S& self) { return C::to_python(self.*member); },
        [member](S& self, typename C::Python value) { self.*member = C::to_cpp(value); });
    return *this;
  }

  template <std::size_t N>
  Struct& field(const char* name, int64_t (S::*member)[N]) {
    using Values = std::array<int64_t, N>;
    auto get = [member](const S& self) {
      Values values;
      std::memcpy(values.data(), self.*member, sizeof values);
      return values;
    };
    auto set = [member](S& self, const Values& values) {
      std::memcpy(self.*member, values.data(), sizeof values);
    };
    type_.def_prop_rw(name, get, set);
    return *this;
  }

  // A struct inside this one.
  template <typename T>
  Struct& nested(const char* name, T S::*member) {
    type_.def_rw(name, member);
    return *this;
  }

  // A pointer to another struct, which then lives as long as this one.
  template <typename T>
  Struct& refers(const char* name, const T* S::*member) {
    auto get = [member](const S& self) { return self.*member; };
    auto set = [member](S& self, const T& other) { self.*member = &other; };
    type_.def_prop_rw(name, get, set, nb::for_getter(nb::rv_policy::reference),
                      nb::for_setter(nb::keep_alive<1, 2>()));
    return *this;
  }

  nb::class_<S>& type() { return type_; }

 private:
  nb::class_<S> type_;
};

// A function of the table as a method; other Python threads run meanwhile.
template <typename Result, typename... Arguments>
void method(nb::class_<Kernels>& type, const char* name,
            Result (*Kernels::*function)(Arguments...)) {
  auto call = [function](const Kernels& self, typename Convert<Arguments>::Python... arguments) {
    return (self.*function)(Convert<Arguments>::to_cpp(arguments)...);
  };
  type.def(name, call, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace corematching
