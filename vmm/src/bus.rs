//! Ports and device registers that end up in this process: serial console, CMOS clock, reset and power-off ports, virtio windows.

use crate::cmos::{CMOS_DATA, CMOS_INDEX, Cmos};
use crate::console::ConsoleRing;
use crate::vcpu::GuestExit;
use crate::virtio::MmioTransport;
use crate::virtio::mmio::WINDOW_BYTES;
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// First port of the serial console (COM1), and its interrupt.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u32 = 4;
/// The keyboard controller's command port, through which PCs are reset, and the command.
pub const I8042_COMMAND: u16 = 0x64;
pub const I8042_RESET: u8 = 0xfe;
/// ACPI's sleep registers, and what a guest writes to switch itself off: the type that `_S5_` names, and "enable".
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;
/// The interrupt of the power button.
pub const POWER_BUTTON_IRQ: u32 = 3;
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

/// Bytes typed ahead of the guest: a long line pasted, not a file.
const TYPED_BYTES_MAX: usize = 64 << 10;

/// The serial port, and what is typed and does not fit into its FIFO yet.
struct SerialPort {
    uart: Uart,
    typed: VecDeque<u8>,
}

impl SerialPort {
    /// Moves what was typed into the FIFO as far as it has room.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.typed.len());
        if room == 0 {
            return;
        }
        let next: Vec<u8> = self.typed.iter().take(room).copied().collect();
        match self.uart.enqueue_raw_bytes(&next) {
            // None in loop mode: they stay for later.
            Ok(taken) => drop(self.typed.drain(..taken)),
            Err(error) => tracing::debug!(?error, "serial input"),
        }
    }
}

/// Everything a guest can reach besides memory.
pub struct Bus {
    serial: Mutex<SerialPort>,
    cmos: Mutex<Cmos>,
    devices: Vec<MmioTransport>,
}

impl Bus {
    /// A bus with the devices in the order of their windows.
    pub fn new(console: ConsoleRing, interrupt: EventFd, devices: Vec<MmioTransport>) -> Self {
        Self {
            serial: Mutex::new(SerialPort {
                uart: Serial::new(SerialInterrupt(interrupt), console),
                typed: VecDeque::new(),
            }),
            cmos: Mutex::default(),
            devices,
        }
    }

    /// The devices.
    pub fn devices(&self) -> &[MmioTransport] {
        &self.devices
    }

    /// Where console output goes.
    pub fn console(&self) -> ConsoleRing {
        self.serial().uart.writer().clone()
    }

    /// The serial console's registers, and what is typed ahead.
    pub fn serial_state(&self) -> (SerialState, Vec<u8>) {
        let serial = self.serial();
        (serial.uart.state(), serial.typed.iter().copied().collect())
    }

    /// Takes over the serial console's registers, and what is typed ahead.
    ///
    /// # Errors
    /// The state holds more input than the console has room for.
    pub fn restore_serial(&self, state: &SerialState, typed: &[u8]) -> Result<(), String> {
        if typed.len() > TYPED_BYTES_MAX {
            return Err(format!("{} bytes are typed ahead", typed.len()));
        }
        let mut serial = self.serial();
        let console = serial.uart.writer().clone();
        let interrupt = serial.uart.interrupt_evt().0.try_clone().map_err(|error| error.to_string())?;
        serial.uart = Serial::from_state(state, SerialInterrupt(interrupt), NoEvents, console)
            .map_err(|error| format!("{error:?}"))?;
        serial.typed = typed.iter().copied().collect();
        Ok(())
    }

    /// Types bytes into the serial console; returns how many, as there is room for.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        let mut serial = self.serial();
        let taken = bytes.len().min(TYPED_BYTES_MAX - serial.typed.len());
        serial.typed.extend(&bytes[..taken]);
        serial.refill();
        taken
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The CMOS clock.
    pub fn cmos(&self) -> MutexGuard<'_, Cmos> {
        self.cmos.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a port; where there is nothing it reads ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            SERIAL_PORT..=0x3ff if data.len() == 1 => {
                let mut serial = self.serial();
                data[0] = serial.uart.read((port - SERIAL_PORT) as u8);
                serial.refill();
            }
            // The keyboard controller is always ready.
            I8042_COMMAND | SLEEP_STATUS_PORT if data.len() == 1 => data[0] = 0,
            CMOS_DATA if data.len() == 1 => data[0] = self.cmos().read(SystemTime::now()),
            _ => {}
        }
    }

    /// The guest writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        let [value] = *data else { return None };
        match port {
            SERIAL_PORT..=0x3ff => {
                if let Err(error) = self.serial().uart.write((port - SERIAL_PORT) as u8, value) {
                    tracing::debug!(?error, "serial");
                }
                None
            }
            CMOS_INDEX => {
                self.cmos().select(value);
                None
            }
            SLEEP_CONTROL_PORT if value == SLEEP_OFF => Some(GuestExit::Poweroff),
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
