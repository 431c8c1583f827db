//! A GICv2m frame: the registers by which a GICv2 takes MSIs (Linux, drivers/irqchip/irq-gic-v2m.c;
//! Arm DEN 0029, Server Base System Architecture, appendix on GICv2m).

use crate::Device;
use crate::action::Action;
use crate::bus::answer;

/// The offset of MSI_SETSPI_NS, which messages are written to.
pub const DOORBELL: u64 = 0x40;
/// The offset of MSI_TYPER: the first INTID in bits 25:16, how many there are in bits 9:0.
const TYPER: u64 = 0x08;

/// A frame. Messages of PCI functions do not come here: their senders raise the interrupt.
pub struct Frame {
    first: u32,
    count: u32,
    raise: Box<dyn Fn(u32) + Send>,
}

impl Frame {
    /// Creates the frame of `count` interrupts from INTID `first` on; a CPU that writes a message has `raise`
    /// raise the INTID.
    pub fn new(first: u32, count: u32, raise: impl Fn(u32) + Send + 'static) -> Frame {
        Frame {
            first,
            count,
            raise: Box::new(raise),
        }
    }
}

impl Device for Frame {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        if offset == TYPER {
            answer(data, (self.first & 0x3ff) << 16 | self.count & 0x3ff);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        // The halfword is a message too.
        let intid = match *data {
            [a, b] | [a, b, _, _] if offset == DOORBELL => {
                u32::from(u16::from_le_bytes([a, b])) & 0x3ff
            }
            _ => return Action::None,
        };
        if intid.wrapping_sub(self.first) < self.count {
            (self.raise)(intid);
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_frame_says_which_interrupts_it_has_and_raises_no_other() {
        let (sender, raised) = channel();
        let mut frame = Frame::new(80, 16, move |intid| sender.send(intid).expect("a test"));
        let mut word = [0xff; 4];
        let _ = frame.read(TYPER, &mut word);
        assert_eq!(u32::from_le_bytes(word), 80 << 16 | 16);
        let _ = frame.read(0xfcc, &mut word);
        assert_eq!(word, [0; 4]);
        for intid in [79_u32, 80, 95, 96, u32::MAX] {
            let _ = frame.write(DOORBELL, &intid.to_le_bytes());
        }
        let _ = frame.write(0x44, &80_u32.to_le_bytes());
        let _ = frame.write(DOORBELL, &80_u64.to_le_bytes());
        drop(frame);
        assert_eq!(raised.iter().collect::<Vec<_>>(), [80, 95]);
    }
}
