//! Each rule of `apply` by the behaviour that it gives. The fixture checks all invariants after each entry, and that a rejected
//! entry changes nothing.

mod duty;
mod govern;
mod groups;
mod hosts;
mod membership;
mod migrations;
mod networks;
mod pool;
mod random;
mod reclaim;
mod run;
mod size;
mod users;
mod vms;
