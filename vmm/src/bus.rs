//! Ports and device registers that end up in this process: serial console, reset and power-off ports, virtio windows.

use crate::console::ConsoleRing;
use crate::vcpu::GuestExit;
use crate::virtio::MmioTransport;
use crate::virtio::mmio::WINDOW_BYTES;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// First port of the serial console (COM1), and its interrupt.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u32 = 4;
/// The keyboard controller's command port, through which PCs are reset, and the command.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// A byte written here ends the machine: 0 for a power-off, anything else for a crash. For guests without ACPI.
pub const EXIT_PORT: u16 = 0xf4;
/// First register window of the virtio devices, and the interrupt of the first one.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
pub const VIRTIO_IRQ: u32 = 5;

/// The serial console's interrupt.
pub struct SerialInterrupt(pub EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = Serial<SerialInterrupt, NoEvents, ConsoleRing>;

/// Everything a guest can reach besides memory.
pub struct Bus {
    serial: Mutex<Uart>,
    devices: Vec<MmioTransport>,
}

impl Bus {
    /// A bus with the devices in the order of their windows.
    pub fn new(console: ConsoleRing, interrupt: EventFd, devices: Vec<MmioTransport>) -> Self {
        Self { serial: Mutex::new(Serial::new(SerialInterrupt(interrupt), console)), devices }
    }

    /// The devices.
    pub fn devices(&self) -> &[MmioTransport] {
        &self.devices
    }

    /// Where console output goes.
    pub fn console(&self) -> ConsoleRing {
        self.serial().writer().clone()
    }

    /// The serial console's registers.
    pub fn serial_state(&self) -> SerialState {
        self.serial().state()
    }

    /// Takes over the serial console's registers.
    ///
    /// # Errors
    /// The state holds more input than the console has room for.
    pub fn restore_serial(&self, state: &SerialState) -> Result<(), String> {
        let mut serial = self.serial();
        let console = serial.writer().clone();
        let interrupt = serial.interrupt_evt().0.try_clone().map_err(|error| error.to_string())?;
        *serial = Serial::from_state(state, SerialInterrupt(interrupt), NoEvents, console)
            .map_err(|error| format!("{error:?}"))?;
        Ok(())
    }

    /// Types bytes into the serial console; what doesn't fit into its FIFO is dropped, as on a real line.
    pub fn serial_input(&self, bytes: &[u8]) {
        if let Err(error) = self.serial().enqueue_raw_bytes(bytes) {
            tracing::debug!(?error, "serial input dropped");
        }
    }

    fn serial(&self) -> MutexGuard<'_, Uart> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a port; where there is nothing it reads ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            SERIAL_PORT..=0x3ff if data.len() == 1 => {
                data[0] = self.serial().read((port - SERIAL_PORT) as u8)
            }
            // The keyboard controller is always ready.
            I8042_COMMAND if data.len() == 1 => data[0] = 0,
            _ => {}
        }
    }

    /// The guest writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        let [value] = *data else { return None };
        match port {
            SERIAL_PORT..=0x3ff => {
                if let Err(error) = self.serial().write((port - SERIAL_PORT) as u8, value) {
                    tracing::debug!(?error, "serial");
                }
                None
            }
            I8042_COMMAND if value == I8042_RESET => Some(GuestExit::Reboot),
            EXIT_PORT if value == 0 => Some(GuestExit::Poweroff),
            EXIT_PORT => Some(GuestExit::Crash { cause: format!("the guest reported failure {value}") }),
            _ => None,
        }
    }

    /// The guest reads a register.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.device_at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes a register.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device_at(address) {
            device.write(offset, data);
        }
    }

    fn device_at(&self, address: u64) -> Option<(&MmioTransport, u64)> {
        let from_base = address.checked_sub(VIRTIO_BASE)?;
        let index = usize::try_from(from_base / WINDOW_BYTES).ok()?;
        Some((self.devices.get(index)?, from_base % WINDOW_BYTES))
    }
}
