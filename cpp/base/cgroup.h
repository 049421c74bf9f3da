// The control groups this process is in: what limits its memory and processor time besides the machine itself.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <optional>
#include <sstream>
#include <string>

namespace splitfuse {

/// The first number in a file; nothing if it cannot be read or holds a word ("max").
inline std::optional<int64_t> read_number(const std::string& file) {
  std::ifstream in(file);
  int64_t value = 0;
  if (in >> value) return value;
  return std::nullopt;
}

/// The number after `key` in a file of "key value" lines, with or without a colon.
inline std::optional<int64_t> read_keyed_number(const std::string& file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    std::string name;
    int64_t value = 0;
    if (fields >> name >> value && (name == key || name == key + ":")) return value;
  }
  return std::nullopt;
}

/// Where a control group hierarchy is mounted, and what part of it the mount shows.
struct CgroupMount {
  std::string root;
  std::string folder;
};

/// The mount of version 2 (`controller` empty), or of that controller in version 1.
inline std::optional<CgroupMount> find_cgroup_mount(const std::string& controller) {
  std::ifstream in("/proc/self/mountinfo");
  for (std::string line; std::getline(in, line);) {
    // id parent device root folder options [tags] - type source super-options
    std::istringstream left(line);
    std::string skip;
    CgroupMount mount;
    left >> skip >> skip >> skip >> mount.root >> mount.folder;
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream right(line.substr(dash + 3));
    std::string type;
    std::string options;
    right >> type >> skip >> options;
    if (controller.empty()
            ? type == "cgroup2"
            : type == "cgroup" && ("," + options + ",").find("," + controller + ",") != std::string::npos) {
      return mount;
    }
  }
  return std::nullopt;
}

/// The path of this process's group: version 2's (`controller` empty), or that controller's in version 1.
inline std::optional<std::string> find_cgroup_path(const std::string& controller) {
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    // id:controllers:path
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = line.substr(first + 1, second - first - 1);
    if (controller.empty() ? names.empty() : ("," + names + ",").find("," + controller + ",") != std::string::npos) {
      return line.substr(second + 1);
    }
  }
  return std::nullopt;
}

/// Calls `visit` with the folder of this process's group and of each group above it that can be seen: of version 2
/// (`controller` empty), or of that controller in version 1.
inline void for_each_cgroup(const std::string& controller, const std::function<void(const std::string&)>& visit) {
  const auto mount = find_cgroup_mount(controller);
  const auto group = find_cgroup_path(controller);
  if (!mount || !group) return;
  std::string path = *group;
  // Inside a container the mount may show only a part of the tree.
  if (mount->root != "/") {
    path = path.rfind(mount->root, 0) == 0 ? path.substr(mount->root.size()) : "";
  }
  while (!path.empty() && path != "/") {
    visit(mount->folder + path);
    path.resize(path.rfind('/'));
  }
  visit(mount->folder);
}

}  // namespace splitfuse
