//! Which control groups a jail is in, as steps to take: versions 1 and 2 of cgroups
//! (Documentation/admin-guide/cgroup-v1/cgroups.rst, cgroup-v2.rst).

use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// A step; each is harmless where it was taken before.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// Make a group, and those that it is in.
    Make(PathBuf),
    /// Write a value to a file of a group.
    Write(PathBuf, String),
    /// Give a file that is empty in a new group the value that the group above has.
    Inherit(PathBuf),
    /// Move this process into a group.
    Enter(PathBuf),
    /// Move this process into a group if there is one.
    EnterExisting(PathBuf),
}

/// The controller whose groups begin without CPUs and memory (cgroup-v1/cpusets.rst, section 2).
const EMPTY_AT_FIRST: (&str, [&str; 2]) = ("cpuset", ["cpuset.cpus", "cpuset.mems"]);

/// Decides on the steps that give the group `parent`/`id` these values (`cpu.shares=10`), and move
/// this process there.
pub(super) fn plan(
    version: &str,
    mounts: &str,
    parent: &Path,
    id: &str,
    values: &[String],
) -> Result<Vec<Step>> {
    let unified = match version {
        "1" => false,
        "2" => true,
        _ => bail!("--cgroup-version '{version}': there are 1 and 2"),
    };
    let (mut steps, mut entered) = (Vec::new(), Vec::new());
    if unified && values.is_empty() {
        // Then the group is the parent's, if somebody made one.
        let found = hierarchy(mounts, None);
        steps.extend(found.map(|root| Step::EnterExisting(root.join(parent))));
    }
    for value in values {
        let (file, text) = value.split_once('=').unwrap_or((value, ""));
        let controller = file.split_once('.').map(|(controller, _)| controller);
        let controller = controller.filter(|name| !name.is_empty() && !file.contains('/'));
        let Some(controller) = controller.filter(|_| !text.is_empty()) else {
            bail!("--cgroup '{value}': use FILE=VALUE, such as cpu.shares=10 or pids.max=64");
        };
        let root = hierarchy(mounts, (!unified).then_some(controller));
        let root = root.with_context(|| match unified {
            true => "no cgroups of version 2 are mounted here; use --cgroup-version 1".to_owned(),
            false => format!(
                "no controller '{controller}' of cgroups of version 1 is mounted here; \
                 --cgroup-version 2 is for cgroups of version 2"
            ),
        })?;
        let group = root.join(parent).join(id);
        steps.push(Step::Make(group.clone()));
        // The groups from the first one below the root to this one.
        let ways = parent.components().map(|part| part.as_os_str());
        let mut way = root;
        for name in ways.chain([id.as_ref()]) {
            if unified && controller != "cgroup" {
                let enable = format!("+{controller}");
                steps.push(Step::Write(way.join("cgroup.subtree_control"), enable));
            }
            way.push(name);
            if !unified && controller == EMPTY_AT_FIRST.0 {
                let files = EMPTY_AT_FIRST.1.iter();
                steps.extend(files.map(|file| Step::Inherit(way.join(file))));
            }
        }
        steps.push(Step::Write(group.join(file), text.to_owned()));
        if !entered.contains(&group) {
            entered.push(group);
        }
    }
    steps.extend(entered.into_iter().map(Step::Enter));
    Ok(steps)
}

/// Finds where the cgroups of version 2 are mounted, or those of a controller of version 1
/// (proc(5): /proc/mounts).
fn hierarchy(mounts: &str, controller: Option<&str>) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (folder, kind, options) = (words.next()?, words.next()?, words.next()?);
        let is_it = match controller {
            None => kind == "cgroup2",
            Some(name) => kind == "cgroup" && options.split(',').any(|option| option == name),
        };
        is_it.then(|| folder.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";

    fn planned(version: &str, values: &[&str]) -> Result<Vec<Step>> {
        let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        plan(version, MOUNTS, Path::new("a/b"), "vm", &values)
    }

    fn write(path: &str, value: &str) -> Step {
        Step::Write(path.into(), value.into())
    }

    #[test]
    fn version_1_has_a_group_for_each_hierarchy_and_fills_empty_cpusets() {
        let cpu = "/sys/fs/cgroup/cpu,cpuacct/a/b/vm";
        let set = "/sys/fs/cgroup/cpuset/a";
        let inherit = |path: &str| Step::Inherit(path.into());
        let steps = planned("1", &["cpu.shares=10", "cpuset.mems=0", "cpu.x=1=2"]);
        assert_eq!(
            steps.expect("steps"),
            [
                Step::Make(cpu.into()),
                write(&format!("{cpu}/cpu.shares"), "10"),
                Step::Make(format!("{set}/b/vm").into()),
                inherit(&format!("{set}/cpuset.cpus")),
                inherit(&format!("{set}/cpuset.mems")),
                inherit(&format!("{set}/b/cpuset.cpus")),
                inherit(&format!("{set}/b/cpuset.mems")),
                inherit(&format!("{set}/b/vm/cpuset.cpus")),
                inherit(&format!("{set}/b/vm/cpuset.mems")),
                write(&format!("{set}/b/vm/cpuset.mems"), "0"),
                Step::Make(cpu.into()),
                write(&format!("{cpu}/cpu.x"), "1=2"),
                Step::Enter(cpu.into()),
                Step::Enter(format!("{set}/b/vm").into()),
            ]
        );
    }

    #[test]
    fn version_2_enables_the_controller_from_the_root_down() {
        let root = "/sys/fs/cgroup/unified";
        let group = format!("{root}/a/b/vm");
        let enable = |path: &str| write(&format!("{root}{path}/cgroup.subtree_control"), "+pids");
        assert_eq!(
            planned("2", &["pids.max=64"]).expect("steps"),
            [
                Step::Make((&group).into()),
                enable(""),
                enable("/a"),
                enable("/a/b"),
                write(&format!("{group}/pids.max"), "64"),
                Step::Enter((&group).into()),
            ]
        );
    }

    #[test]
    fn without_values_version_2_enters_the_parents_group_and_version_1_none() {
        let parent = Step::EnterExisting("/sys/fs/cgroup/unified/a/b".into());
        assert_eq!(planned("2", &[]).expect("steps"), [parent]);
        assert_eq!(planned("1", &[]).expect("steps"), []);
    }

    #[test]
    fn files_outside_of_the_group_and_missing_controllers_are_refused() {
        for (version, value, said) in [
            ("1", "cpu.shares", "use FILE=VALUE"),
            ("1", "cpu.shares=", "use FILE=VALUE"),
            ("1", "shares=1", "use FILE=VALUE"),
            ("1", "../cpu.shares=1", "use FILE=VALUE"),
            ("1", "/cpu.shares=1", "use FILE=VALUE"),
            ("2", "cpu.x/../../y=1", "use FILE=VALUE"),
            ("2", "..=1", "use FILE=VALUE"),
            ("1", "pids.max=1", "no controller 'pids'"),
            ("3", "cpu.shares=1", "there are 1 and 2"),
        ] {
            let error = planned(version, &[value]).expect_err(value);
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
        let error = plan("2", "", Path::new("a"), "vm", &["pids.max=1".to_owned()]);
        let error = format!("{:#}", error.expect_err("no mounts"));
        assert!(error.contains("--cgroup-version 1"), "{error}");
    }
}
