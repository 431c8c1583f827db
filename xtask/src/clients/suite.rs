//! fctools' own tests, which it is published with, on armlet, plain and in jails.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::files::Files;
use super::packages::{build_folder, sources};
use crate::command::{output_of, run_watched};
use crate::progress::say;
use crate::repository::cargo;

/// Its test programs that are run, with their features; the others want a whole system in the guest.
const PROGRAMS: [&str; 4] = ["vm", "vm_api", "process", "other"];
const FEATURES: &str = "full,rustix-syscall-backend";
/// How long it may be silent while it is built, and while it runs.
const BUILD_SILENCE: Duration = Duration::from_secs(180);
const SILENCE: Duration = Duration::from_secs(60);
/// Whose the jails are.
const OWNER: u32 = 12345;

/// The tests that fail, and why: a guest of a few instructions has no drivers, and what armlet does not
/// offer is a row of docs/api.md. One that passes is to leave this list.
const FAILING: &[(&str, &str)] = &[
    ("vm_api_can_perform_balloon_free_page_hinting_runs", BALLOON),
    ("vm_api_can_update_balloon", BALLOON),
    ("vm_api_can_get_balloon_statistics", BALLOON),
];
const BALLOON: &str = "the guest has no balloon driver";

/// Parts of the names of those that want nft, which not every machine has.
const WANT_NFT: [&str; 2] = ["networking", "mmds"];

/// Runs them; returns how many passed.
pub(super) fn run(folder: &Path, files: &Files) -> Result<String> {
    let sources = sources("fctools", folder)?;
    let data = folder.join("fctools-data");
    write_data(&data, files)?;
    let cargo = |more: &[&str]| {
        let mut command = cargo();
        command.args([
            "test",
            "--locked",
            "--no-fail-fast",
            "--no-default-features",
            "--features",
            FEATURES,
        ]);
        for program in PROGRAMS {
            command.args(["--test", program]);
        }
        // Nobody waits for this code.
        for setting in ["package.\"*\"", "build-override"] {
            command.args(["--config", &format!("profile.dev.{setting}.opt-level=0")]);
        }
        command
            .arg("--target-dir")
            .arg(build_folder(folder))
            .args(more);
        command.current_dir(&sources);
        command
    };
    say("building the tests of fctools");
    let log = files.logs.join("fctools-build");
    let watched = [build_folder(folder)];
    run_watched(&mut cargo(&["--no-run"]), &log, &watched, BUILD_SILENCE)
        .with_context(|| format!("see {log:?}"))?;
    say("running them");
    let log = files.logs.join("fctools");
    let mut words = vec!["--", "--test-threads=4"];
    let nft = Command::new("nft").arg("--version").output();
    let has_nft = nft.is_ok_and(|output| output.status.success());
    if !has_nft {
        words.extend(WANT_NFT.iter().flat_map(|part| ["--skip", part]));
    }
    let tests = cargo(&words);
    let mut command = files.namespace(Path::new("python3"));
    command.arg(tests.get_program()).args(tests.get_args());
    command
        .current_dir(&sources)
        .env("FCTOOLS_TESTDATA_PATH", &data);
    // Its status says that tests failed: which did decides.
    let outcome = run_watched(&mut command, &log, &[], SILENCE);
    let said = fs::read_to_string(&log).with_context(|| format!("cannot read {log:?}"))?;
    let done = judge(&said).map_err(|error| match outcome {
        Err(ended) if said.is_empty() => ended,
        _ => error.context(format!("see {log:?}")),
    })?;
    Ok(match has_nft {
        true => done,
        false => format!("{done}; without those that want nft"),
    })
}

/// Writes what its tests are told of this machine, and the files that they use.
fn write_data(data: &Path, files: &Files) -> Result<()> {
    let write = |name: &str, text: &str| {
        let path = data.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {path:?}"))
    };
    for folder in ["toolchain", "assets", "configs"] {
        let folder = data.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
    }
    for (from, to) in [
        ("firecracker", "toolchain/firecracker"),
        ("jailer", "toolchain/jailer"),
        ("guest", "assets/kernel"),
        ("disk", "assets/rootfs.ext4"),
    ] {
        let to = data.join(to);
        drop(fs::remove_file(&to));
        let copied = fs::copy(files.folder.join(from), &to);
        copied.with_context(|| format!("cannot write {to:?}"))?;
    }
    let program = data.join("toolchain/firecracker");
    let said = output_of(Command::new(program).arg("--version"))?;
    let version = said.split_whitespace().nth(1);
    let version = version.and_then(|word| word.strip_prefix('v'));
    let version = version.context("firecracker has no version")?;
    // There is no such program of armlet's; the other tells of a version that is not asked for.
    for (name, says) in [
        ("snapshot-editor", format!("snapshot-editor v{version}")),
        ("firecracker-wrong-version", "Firecracker v0.0.0".to_owned()),
    ] {
        let name = format!("toolchain/{name}");
        write(&name, &format!("#!/bin/sh\necho {says}\n"))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(data.join(&name), mode)
            .with_context(|| format!("cannot set the mode of {name}"))?;
    }
    let options = format!(
        r#"{{"toolchain": {{"version": "{version}", "snapshot_version": ""}},
            "waits": {{"shutdown_timeout_ms": 10000, "boot_wait_ms": 1000, "boot_socket_timeout_ms": 10000}},
            "network_interface": "lo", "jailer_uid": {OWNER}, "jailer_gid": {OWNER}}}"#
    );
    write("options.json", &options)?;
    let assets = format!("{}/assets", data.display());
    for (name, folder) in [("unrestricted", assets.as_str()), ("jailed", "")] {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "{folder}/kernel"}},
                "drives": [{{"drive_id": "rootfs", "is_root_device": true, "is_read_only": true,
                    "path_on_host": "{folder}/rootfs.ext4"}}],
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 128}}}}"#
        );
        write(&format!("configs/{name}.json"), &text)?;
    }
    Ok(())
}

/// Judges what the tests printed.
fn judge(said: &str) -> Result<String> {
    let mut outcomes = BTreeMap::new();
    for line in said.lines() {
        let test = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "));
        if let Some((name, outcome)) = test {
            outcomes.insert(name, outcome.trim() == "ok");
        }
    }
    let reason = |name: &str| FAILING.iter().find(|(failing, _)| *failing == name);
    let mut wrong = Vec::new();
    for (name, passed) in &outcomes {
        match (passed, reason(name)) {
            (false, None) => wrong.push(format!("{name} failed")),
            (true, Some(_)) => wrong.push(format!("{name} passed, though it is listed as failing")),
            _ => {}
        }
    }
    for (name, _) in FAILING {
        if !outcomes.contains_key(name) {
            wrong.push(format!("{name} was not run"));
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join(", "));
    }
    let passed = outcomes.values().filter(|passed| **passed).count();
    ensure!(passed > 0, "no test was run");
    Ok(format!(
        "{passed} of its own {} tests pass, the others as listed",
        outcomes.len()
    ))
}
