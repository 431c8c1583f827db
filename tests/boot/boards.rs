//! Boards: which one is taken, what a plan for another host is, and what is refused.

use crate::rig;
use serde_json::Value;
use std::process::{Command, Output, Stdio};

fn armlet(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
    let output = command.args(arguments).stdin(Stdio::null()).output();
    output.expect("armlet can be run")
}

fn plan(arguments: &[&str]) -> Value {
    let words = [&["plan", "--json", "--deterministic"], arguments].concat();
    let output = armlet(&words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn refused(arguments: &[&str]) -> String {
    let output = armlet(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_plan_for_another_host_has_its_board_pages_and_controller() {
    let plan_of = |page: &str| {
        let words = ["--host", "rpi5", "--page-size", page, "--cpus", "4"];
        plan(&[&words[..], &["--memory", "16G"]].concat())
    };
    let (large, small) = (plan_of("16k"), plan_of("4K"));
    assert_eq!(large["board"], "rpi5");
    assert_eq!(large["irqchip"]["version"], "2");
    assert_eq!(large["ipa"]["host_limit"], 40);
    assert_eq!(large["ipa"]["stage2_levels"], 2);
    assert_eq!(small["ipa"]["stage2_levels"], 3);
    assert_eq!(large["map"], small["map"]);
}

#[test]
fn who_chose_what_is_said() {
    let plan = plan(&["--host", "rpi4", "--memory", "1G"]);
    let from = |name: &str| {
        let settings = plan["settings"].as_array().expect("a list");
        let found = settings.iter().find(|setting| setting["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}"))["from"].clone()
    };
    assert_eq!(from("memory"), "--memory");
    assert_eq!(from("vCPUs"), "board rpi4");
    assert_eq!(from("GIC"), "default");
}

#[test]
fn pages_that_a_host_cannot_have_are_refused_with_those_it_can() {
    let line = refused(&["plan", "--host", "rpi4", "--page-size", "16K"]);
    assert!(line.contains("board 'rpi4' have 4K, 64K"), "{line}");
    let line = refused(&["plan", "--host", "this", "--page-size", "4K"]);
    assert!(line.contains("name a board by --host"), "{line}");
}

#[test]
fn a_board_without_an_interrupt_controller_says_why_no_guest_runs() {
    let output = armlet(&["plan", "--board", "rpi3"]);
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{line}");
    assert!(line.contains("Raspberry Pi 3 has no GIC"), "{line}");
    assert!(line.contains("use a Raspberry Pi 4 or 5"), "{line}");
}

#[test]
fn the_host_is_recognised_and_its_board_gives_the_plan_of_the_host() {
    let Some(rig) = rig::any() else { return };
    let profile = rig.facts.all["profile"].as_str().expect("a name");
    let machine = std::env::var("ARMLET_RIG_MACHINE").unwrap_or_else(|_| "virt".to_owned());
    if rig.facts.all["board"] == "linux,dummy-virt" {
        assert_eq!(profile, "qemu-virt");
    }
    if machine == "raspi4b" {
        assert_eq!(profile, "rpi4");
    }
    let here = plan(&["--host", "this", "--cpus", "4", "--memory", "1G"]);
    assert_eq!(here["board"], profile);
    if profile == "qemu-virt" && rig::main().is_none() {
        println!("this board's hosts can have any CPU and GIC; it assumes those of that one");
        return;
    }
    // The same machine, planned from what the board says of its hosts.
    let page = rig.facts.page_size.to_string();
    let words = ["--host", profile, "--page-size", &page, "--cpus", "4"];
    let words = [&words[..], &["--memory", "1G"]].concat();
    let there = plan(&words);
    for part in [
        "board", "ipa", "map", "irqchip", "devices", "features", "vcpus",
    ] {
        assert_eq!(here[part], there[part], "{part}");
    }
    let tree = |words: &[&str]| {
        let output = armlet(&[&["plan", "--dts", "--deterministic"], words].concat());
        assert!(output.status.success(), "{words:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let here = tree(&["--host", "this", "--cpus", "4", "--memory", "1G"]);
    if here.contains("cache-size") {
        println!("this host tells of its caches, of which a board does not know: trees differ");
        return;
    }
    assert_eq!(here, tree(&words));
}
