//! Filters that are made when the program is compiled: those of machines whose devices need nothing, which are
//! started from a kernel or from a snapshot.

/// The filters of a machine with some needs.
macro_rules! made {
    ($name:ident, $needs:expr) => {
        pub(super) mod $name {
            use crate::sandbox::calls::{OTHER, Role, Rules};
            use armlet_backends::kind::Need;
            use armlet_system::seccomp::{Instruction, Outcome, Program, compares_with};

            /// In place of this process's number, which is not known when the program is compiled.
            const PROCESS: u32 = u32::MAX;
            const NEEDS: &[Need] = $needs;

            const OUTER: Rules = Rules::of(Role::Machine, NEEDS, &OTHER);
            const MACHINE: Program = OUTER.write(Outcome::Trap, &OTHER, PROCESS);
            const VCPU: Program =
                Rules::of(Role::Vcpu, NEEDS, &OTHER).write_within(&OUTER, Outcome::Trap);
            /// Where this process's number is to be.
            const PROCESS_AT: usize = compares_with(MACHINE.code(), PROCESS);

            /// How many instructions the filter has that the machine begins with.
            pub(crate) const FIRST: usize = MACHINE.len();

            /// That filter, for another process.
            static MACHINE_CODE: [Instruction; FIRST] = MACHINE.exactly();
            /// That of the threads of vCPUs.
            pub(crate) static VCPU_CODE: [Instruction; VCPU.len()] = VCPU.exactly();

            /// The filter that the machine begins with.
            pub(crate) fn first(process: u32) -> [Instruction; FIRST] {
                let mut code = MACHINE_CODE;
                code[PROCESS_AT].value = process;
                code
            }
        }
    };
}

made!(started, &[]);
made!(restored, &[Need::Restoring]);
