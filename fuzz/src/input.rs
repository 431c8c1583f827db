//! Bytes of a fuzzer as the choices of a guest or of a process of the host.

/// What is left of an input. Past its end every choice is 0.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let (taken, left) = self.0.split_at(N.min(self.0.len()));
        array[..taken.len()].copy_from_slice(taken);
        self.0 = left;
        array
    }

    /// Any byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Any 16 bits.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Any 32 bits.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Any 64 bits.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Yes in half of all cases.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// No in most cases: yes for one of `n` bytes.
    pub fn rarely(&mut self, n: u8) -> bool {
        self.u8() % n == n - 1
    }

    /// A number below `end`, which is at least 1.
    pub fn below(&mut self, end: usize) -> usize {
        match end {
            0..=256 => usize::from(self.u8()) % end,
            _ => usize::from(self.u16()) % end,
        }
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Up to `most` bytes, fewer at the input's end.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(most.min(self.0.len()));
        self.0 = left;
        taken
    }

    /// A number that is small, at an edge, or anything.
    pub fn number(&mut self) -> u32 {
        match self.u8() {
            choice @ 0..=31 => u32::from(choice),
            32..=79 => u32::from(self.u8()),
            80..=127 => u32::from(self.u16()),
            choice @ 128..=223 => {
                let power = 1_u32 << (choice & 31);
                match choice {
                    128..=159 => power,
                    160..=191 => power - 1,
                    _ => power.wrapping_neg(),
                }
            }
            _ => self.u32(),
        }
    }
}
