//! Tests of the real `poold-vm` program: the probe guest under KVM, its disk on a real replica server.

mod machine;
mod migration;
mod support;
mod take_back;
mod way_back;
