//! The head of a snapshot: all that is known of the machine without its state.

use crate::asked::Asked;
use crate::boards::{self, Chosen};
use crate::config::{self, Config};
use crate::decide::for_restore;
use crate::host::HostFiles;
use crate::kernel::{Initrd, Kernel};
use anyhow::{Context, Result, bail, ensure};
use armlet_arch::switch::Switch;
use armlet_arch::{Arch, Architecture, Board, Plan, Request};
use armlet_system::status::{Fault, Status};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use std::borrow::Cow;
use std::path::Path;

/// The head of a snapshot. It comes from a file, which anybody may have written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// The version of armlet that made it.
    pub armlet: String,
    /// The instruction set of the guest.
    pub architecture: Architecture,
    /// What the plan was made for.
    pub host: Value,
    /// How the machine was asked for.
    pub asked: Asked,
    /// The board.
    pub board: Board,
    /// The header of the guest's kernel, and the bytes of its initial RAM disk.
    pub kernel: Box<RawValue>,
    /// As [`Self::kernel`].
    pub initrd: Option<u64>,
    /// The plan, as text: on the host that it was made on, that of the new one is the same.
    pub plan: Box<RawValue>,
}

/// What of a plan the guest cannot see, or the state says itself: where kernel and initial RAM disk were,
/// which of the host's counters stand behind its own, how vCPUs begin, and paravirtual features of a PC.
const UNSEEN: [&[&str]; 5] = [
    &["width"],
    &["layout", "payload"],
    &["features", "pmu", "perf_type"],
    &["features", "paravirtual"],
    &["features", "exits_off"],
];
/// As [`UNSEEN`], of each vCPU.
const UNSEEN_OF_VCPU: &str = "boot";

impl Head {
    /// Takes down a machine.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn of<A: Arch>(
        mut asked: Asked,
        board: &Board,
        request: &Request<A>,
        host: &A::Host,
        plan: &Plan<A>,
    ) -> Result<Head> {
        for (name, value) in A::pinned(plan) {
            asked.set(name, value);
        }
        let vmgenid = match plan.layout.generation {
            Some(_) => Switch::On,
            None => Switch::Off,
        };
        asked.set("vmgenid", vmgenid.to_string());
        asked.set("cmdline", request.cmdline.clone());
        // The guest's memory stays where it is, and the host may have another limit.
        asked.options.retain(|(name, _)| name != "ipa-bits");
        Ok(Head {
            armlet: env!("CARGO_PKG_VERSION").to_owned(),
            architecture: A::ARCHITECTURE,
            host: serde_json::to_value(host)?,
            asked,
            board: board.clone(),
            kernel: to_raw_value(&request.kernel)?,
            initrd: request.initrd,
            plan: to_raw_value(plan)?,
        })
    }

    /// Reads one.
    ///
    /// # Errors
    /// Bytes that are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Head> {
        serde_json::from_slice(bytes)
            .context("the snapshot's description of its machine is damaged")
    }

    /// Writes it.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).context("cannot describe the machine")
    }

    /// Returns the header of the guest's kernel.
    ///
    /// # Errors
    /// One that cannot be read.
    pub fn kernel<A: Arch>(&self) -> Result<Option<A::Kernel>> {
        ensure!(
            self.architecture == A::ARCHITECTURE,
            "it is of an {} guest, which this host does not run",
            self.architecture
        );
        serde_json::from_slice(self.kernel.get().as_bytes())
            .context("the header of its kernel is damaged")
    }

    /// Returns the board of the machine on this host, as which CPUs vCPUs run on is for the board that
    /// this host is to say.
    ///
    /// # Errors
    /// As [`boards::choose`].
    pub fn board_on(&self, files: &HostFiles) -> Result<Chosen> {
        let fallback = boards::fallback_of(self.architecture);
        Ok(self.board_with(Some(
            boards::choose(boards::AUTO, fallback, || files.identity())?.board,
        )))
    }

    /// Returns the board of the machine on a host that is as the board called `host`, or on the one that
    /// it ran on.
    ///
    /// # Errors
    /// As [`boards::find`].
    pub fn board_for(&self, host: Option<&str>) -> Result<Chosen> {
        Ok(self.board_with(host.map(boards::find).transpose()?))
    }

    /// Returns the board of the machine, on a host like `host` if there is one.
    fn board_with(&self, host: Option<Board>) -> Chosen {
        let mut board = self.board.clone();
        if let Some(host) = host {
            board.guest.pin = host.guest.pin;
            board.host = host.host;
        }
        Chosen {
            board,
            why: "--restore".to_owned(),
        }
    }

    /// Gives a machine that was asked for without a kernel what this guest has of it, and the kernel
    /// itself if it can be opened. Returns why not otherwise: the guest can then not be started again.
    ///
    /// # Errors
    /// A header that is damaged, or of another architecture.
    pub fn give<A: Arch>(&self, config: &mut Config<A>) -> Result<Option<String>> {
        config.request.kernel = self.kernel::<A>()?;
        config.request.initrd = self.initrd;
        // So that a snapshot of the restored guest has them too.
        config.asked.kernel.clone_from(&self.asked.kernel);
        config.asked.initrd.clone_from(&self.asked.initrd);
        Ok(match self.software() {
            Ok((kernel, initrd)) => {
                let header = A::kernel(&config::sized_header(&kernel)).ok();
                let size = initrd.as_ref().map(Initrd::size);
                if header != config.request.kernel || size != self.initrd {
                    return Ok(Some("its kernel or initrd is another one now".to_owned()));
                }
                config.kernel = Some(kernel);
                config.initrd = initrd;
                None
            }
            Err(error) => Some(format!("{error:#}")),
        })
    }

    /// Opens kernel and initial RAM disk.
    fn software(&self) -> Result<(Kernel, Option<Initrd>)> {
        let kernel = self.asked.kernel.as_ref();
        let kernel = Kernel::open(Path::new(kernel.context("it was made without a kernel")?))?;
        let initrd = self.asked.initrd.as_ref();
        let initrd = initrd
            .map(|path| Initrd::open(Path::new(path)))
            .transpose()?;
        Ok((kernel, initrd))
    }

    /// Returns what was planned for the machine, if the guest can go on in it.
    ///
    /// # Errors
    /// Why it could not be planned, or the first difference that the guest could see.
    pub fn accept<A: Arch>(&self, planned: Result<Plan<A>>) -> Result<Plan<A>> {
        let plan = for_restore(planned)?;
        self.check(&plan).fault(Status::Usage)?;
        Ok(plan)
    }

    /// Checks that a guest finds in the machine of a new plan what it had in that of this one.
    ///
    /// # Errors
    /// The first difference, with both values.
    fn check<A: Arch>(&self, plan: &Plan<A>) -> Result<()> {
        if to_raw_value(plan)?.get() == self.plan.get() {
            return Ok(());
        }
        let ours = serde_json::to_value(plan)?;
        let theirs = serde_json::from_slice(self.plan.get().as_bytes())
            .context("the snapshot's plan is damaged")?;
        match difference(&theirs, &ours, &mut Vec::new()) {
            None => Ok(()),
            Some((place, theirs, ours)) => bail!(
                "the machine would differ from the one that was saved: {place} was {theirs} and would be {ours} (saved by armlet {}, this is {})",
                self.armlet,
                env!("CARGO_PKG_VERSION")
            ),
        }
    }
}

/// Whether a guest cannot see what is at this place of a plan.
fn is_unseen(place: &[Cow<'_, str>]) -> bool {
    let is =
        |path: &&[&str]| path.len() == place.len() && path.iter().zip(place).all(|(a, b)| a == b);
    let is_vcpus = |place: &[Cow<'_, str>]| {
        place.len() == 3 && place[0] == "vcpus" && place[2] == UNSEEN_OF_VCPU
    };
    UNSEEN.iter().any(is) || is_vcpus(place)
}

/// Returns the first place at which two values differ and that a guest can see, and what is there.
fn difference<'a>(
    theirs: &'a Value,
    ours: &'a Value,
    place: &mut Vec<Cow<'a, str>>,
) -> Option<(String, String, String)> {
    if is_unseen(place) {
        return None;
    }
    let mut inner = |key: Cow<'a, str>, theirs: Option<&'a Value>, ours: Option<&'a Value>| {
        place.push(key);
        let found = difference(
            theirs.unwrap_or(&Value::Null),
            ours.unwrap_or(&Value::Null),
            place,
        );
        place.pop();
        found
    };
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            let other = ours.keys().filter(|key| !theirs.contains_key(*key));
            let mut keys = theirs.keys().chain(other);
            keys.find_map(|key| inner(Cow::Borrowed(key), theirs.get(key), ours.get(key)))
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            let most = theirs.len().max(ours.len());
            (0..most).find_map(|index| {
                let key = Cow::Owned(index.to_string());
                inner(key, theirs.get(index), ours.get(index))
            })
        }
        (theirs, ours) if theirs == ours => None,
        (theirs, ours) => Some((place.join("."), shown(theirs), shown(ours))),
    }
}

/// Returns a value as text, cut off where it is long.
fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = match value {
        Value::Null => "not there".to_owned(),
        value => value.to_string(),
    };
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::MachineArgs;
    use crate::decide::decide;
    use armlet_arch::aarch64::Aarch64;

    /// The head of a machine of `args` that runs on a host like `host`.
    fn head_of(host: &str, args: &MachineArgs) -> Head {
        let chosen = config::board(args, Some(host), "virt", &crate::host::this());
        let chosen = chosen.expect("a board");
        let cores = chosen.board.host.cores();
        let config = config::read::<Aarch64>(args, chosen, &cores, None).expect("valid");
        let host = Aarch64::assumed_host(&config.board);
        let plan = decide(&config, &host, &config.board).expect("a plan");
        let Config {
            asked,
            board,
            request,
            ..
        } = &config;
        let head = Head::of(asked.clone(), board, request, &host, &plan).expect("a head");
        let bytes = head.to_bytes().expect("JSON");
        let again = Head::from_bytes(&bytes).expect("the same");
        assert_eq!(again.to_bytes().expect("JSON"), bytes);
        head
    }

    /// Whether it goes on on a host like another board; if not, why.
    fn goes_on(head: &Head, host: &str) -> Result<(), String> {
        let mut args = MachineArgs::default();
        let plan = |args: &mut MachineArgs| -> Result<()> {
            head.asked.add_to(args)?;
            let chosen = head.board_for(Some(host))?;
            let cores = chosen.board.host.cores();
            let mut config = config::read::<Aarch64>(args, chosen, &cores, None)?;
            head.give(&mut config)?;
            let known = boards::find(host)?;
            let plan = decide(&config, &Aarch64::assumed_host(&known), &known);
            head.accept(plan).map(drop)
        };
        plan(&mut args).map_err(|error| format!("{error:#}"))
    }

    fn args(words: &[(&str, &str)]) -> MachineArgs {
        let mut asked = Asked::default();
        for (name, value) in words {
            asked.set(name, (*value).to_owned());
        }
        let mut args = MachineArgs::default();
        asked.add_to(&mut args).expect("options");
        args
    }

    #[test]
    fn a_guest_goes_on_on_every_host_that_can_hold_it() {
        let small = args(&[
            ("cpus", "2"),
            ("memory", "512M"),
            ("sve", "off"),
            ("pauth", "off"),
        ]);
        // 52 bits, and 40: what the guest needs is what counts.
        let head = head_of("server52", &small);
        for host in ["server52", "graviton3", "rk3588", "altra"] {
            assert_eq!(goes_on(&head, host), Ok(()), "{host}");
        }
        for (host, why) in [("rpi4", "GIC"), ("rpi5", "GIC")] {
            let error = goes_on(&head, host).expect_err(host);
            assert!(
                error.contains(why) && !error.contains('\n'),
                "{host}: {error}"
            );
        }
        let head = head_of("rpi4", &args(&[("cpus", "2"), ("memory", "512M")]));
        assert_eq!(goes_on(&head, "rpi4"), Ok(()));
        let error = goes_on(&head, "rk3588").expect_err("GICv3 alone");
        assert!(error.contains("GIC"), "{error}");
    }

    #[test]
    fn a_host_without_what_the_guest_has_is_refused_by_its_name() {
        let head = head_of("graviton3", &args(&[("memory", "1G"), ("sve", "on")]));
        assert_eq!(goes_on(&head, "graviton4"), Ok(()));
        let error = goes_on(&head, "rk3588").expect_err("no SVE");
        assert!(error.contains("--sve on"), "{error}");
        let wide = args(&[
            ("memory", "2T"),
            ("sve", "off"),
            ("pmu", "off"),
            ("pauth", "off"),
        ]);
        let error = goes_on(&head_of("server52", &wide), "rk3588").expect_err("too wide");
        assert!(error.contains("bits"), "{error}");
    }

    #[test]
    fn a_plan_that_differs_is_refused_by_the_place_where_it_does() {
        let mut head = head_of("server52", &args(&[("memory", "512M")]));
        for (place, value) in [
            ("/layout/ram/0/size", Value::from(1_u64 << 40)),
            ("/layout/devices/0/spi", Value::from(77)),
            ("/vcpus/0/mpidr", Value::from(5)),
        ] {
            let whole = head.clone();
            let mut plan: Value = serde_json::from_str(head.plan.get()).expect("JSON");
            let found = plan.pointer_mut(place);
            *found.unwrap_or_else(|| panic!("no {place}")) = value;
            head.plan = to_raw_value(&plan).expect("JSON");
            let error = goes_on(&head, "server52").expect_err(place);
            let place = place[1..].replace('/', ".");
            assert!(error.contains(&format!("{place} was ")), "{error}");
            head = whole;
        }
    }
}
