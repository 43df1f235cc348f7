//! What processors can do, as hosts tell the pool and as guests are shown: words of feature bits out of CPUID, and named
//! profiles that say which of them a guest sees.
//!
//! A guest keeps what it was shown at its boot. So it can move to every host whose [`CpuFeatures`] contain those, whatever
//! the profile was called.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which register of a leaf a word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Where a word of features stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// Leaf of CPUID.
    pub leaf: u32,
    /// Its index; 0 for leaves without.
    pub index: u32,
    /// The register.
    pub register: Register,
}

/// Number of words.
pub const CPU_WORDS: usize = 13;

const fn word(leaf: u32, index: u32, register: Register) -> Word {
    Word { leaf, index, register }
}

/// Where each word of [`CpuFeatures`] stands. The last is KVM's own: what the kernel of the host offers.
pub const WORDS: [Word; CPU_WORDS] = [
    word(0x1, 0, Register::Ecx),
    word(0x1, 0, Register::Edx),
    word(0x6, 0, Register::Eax),
    word(0x7, 0, Register::Ebx),
    word(0x7, 0, Register::Ecx),
    word(0x7, 0, Register::Edx),
    word(0x7, 1, Register::Eax),
    word(0xd, 0, Register::Eax),
    word(0xd, 1, Register::Eax),
    word(0x8000_0001, 0, Register::Ecx),
    word(0x8000_0001, 0, Register::Edx),
    word(0x8000_0008, 0, Register::Ebx),
    word(0x4000_0001, 0, Register::Eax),
];

/// Bits of which a baseline says nothing, in the order of [`WORDS`]: what protects kernels, page sizes, timers, and what KVM
/// offers. A guest is shown those that are common to all hosts.
const AROUND: [u32; CPU_WORDS] =
    [0, 0, u32::MAX, bits([7, 20]), bits([2]), u32::MAX, 0, 0, 0, 0, bits([26]), u32::MAX, u32::MAX];

/// Bits whose names a person may know: word, bit, name as /proc/cpuinfo has it.
const NAMES: [(usize, u32, &str); 36] = [
    (0, 0, "pni"),
    (0, 1, "pclmulqdq"),
    (0, 9, "ssse3"),
    (0, 12, "fma"),
    (0, 13, "cx16"),
    (0, 19, "sse4_1"),
    (0, 20, "sse4_2"),
    (0, 21, "x2apic"),
    (0, 22, "movbe"),
    (0, 23, "popcnt"),
    (0, 24, "tsc_deadline_timer"),
    (0, 25, "aes"),
    (0, 26, "xsave"),
    (0, 28, "avx"),
    (0, 29, "f16c"),
    (0, 30, "rdrand"),
    (1, 25, "sse"),
    (1, 26, "sse2"),
    (3, 0, "fsgsbase"),
    (3, 3, "bmi1"),
    (3, 5, "avx2"),
    (3, 7, "smep"),
    (3, 8, "bmi2"),
    (3, 9, "erms"),
    (3, 10, "invpcid"),
    (3, 16, "avx512f"),
    (3, 18, "rdseed"),
    (3, 19, "adx"),
    (3, 20, "smap"),
    (3, 29, "sha_ni"),
    (4, 2, "umip"),
    (4, 3, "pku"),
    (4, 16, "la57"),
    (9, 5, "abm"),
    (10, 26, "pdpe1gb"),
    (10, 27, "rdtscp"),
];

/// Feature words, in the order of [`WORDS`], and how many bits physical addresses have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// The words.
    pub words: [u32; CPU_WORDS],
    /// Bits of physical addresses.
    pub address_bits: u8,
}

impl CpuFeatures {
    /// From a message; `None` if it has another number of words.
    #[must_use]
    pub fn from_words(words: &[u32], address_bits: u32) -> Option<Self> {
        Some(Self { words: words.try_into().ok()?, address_bits: u8::try_from(address_bits).ok()? })
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }

    /// What both have.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        let mut words = self.words;
        words.iter_mut().zip(other.words).for_each(|(word, other)| *word &= other);
        Self { words, address_bits: self.address_bits.min(other.address_bits) }
    }

    /// What `self` has and `host` lacks, by name where it has one; empty if a guest that was shown `self` can be there.
    #[must_use]
    pub fn missing_in(&self, host: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        for (at, (wanted, there)) in self.words.iter().zip(host.words).enumerate() {
            let lacking = wanted & !there;
            missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| name_of(at, bit)));
        }
        if self.address_bits > host.address_bits {
            missing.push(format!("{} bits of physical address", self.address_bits));
        }
        missing
    }
}

fn name_of(at: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|(word, number, _)| (*word, *number) == (at, bit));
    known.map_or_else(
        || {
            let Word { leaf, index, register } = WORDS[at];
            format!("bit {bit} of CPUID {leaf:#x}.{index} {register:?}").to_lowercase()
        },
        |(_, _, name)| (*name).to_owned(),
    )
}

/// What a host can be to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct HostCpu {
    /// What guests may be shown.
    pub features: CpuFeatures,
    /// Rate of its TSC in kHz; 0: unknown.
    pub tsc_khz: u32,
    /// Guests may have another rate.
    pub scales_tsc: bool,
    /// Version of the devices and of the format in which a machine moves.
    pub machine_version: u32,
}

/// Difference of two TSC rates that a guest does not notice, in parts per million: what KVM takes for the same.
const TSC_TOLERANCE_PPM: u64 = 250;

impl HostCpu {
    /// Whether a guest that has run at `self` keeps the rate of its TSC at `target`.
    #[must_use]
    pub fn keeps_tsc_at(&self, target: &Self) -> bool {
        let (here, there) = (u64::from(self.tsc_khz), u64::from(target.tsc_khz));
        here == 0
            || there == 0
            || target.scales_tsc
            || here.abs_diff(there) * 1_000_000 <= here * TSC_TOLERANCE_PPM
    }
}

/// Which features a guest is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum CpuProfile {
    /// What all hosts of the pool have at the guest's boot.
    #[default]
    HostCommon,
    /// SSE4.2, POPCNT, CMPXCHG16B: processors since 2009.
    Level2,
    /// AVX2, BMI, FMA: processors since 2013.
    Level3,
    /// All that the host of its boot can show; the guest moves only to hosts that can, too.
    Host,
}

impl CpuProfile {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::HostCommon, Self::Level2, Self::Level3, Self::Host];

    /// The word that operators write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostCommon => "host-common",
            Self::Level2 => "x86-64-v2",
            Self::Level3 => "x86-64-v3",
            Self::Host => "host",
        }
    }

    /// What a guest is shown that boots at `host`, in a pool whose hosts have `common`.
    #[must_use]
    pub fn resolve(self, host: &CpuFeatures, common: &CpuFeatures) -> CpuFeatures {
        match self {
            Self::HostCommon => *common,
            Self::Host => *host,
            Self::Level2 => baseline(&LEVEL_2, common),
            Self::Level3 => baseline(&LEVEL_3, common),
        }
    }
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No profile has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU profile `{0}`; there are host-common, x86-64-v2, x86-64-v3 and host")]
pub struct ParseCpuProfileError(pub String);

impl FromStr for CpuProfile {
    type Err = ParseCpuProfileError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|profile| profile.as_str() == text);
        found.ok_or_else(|| ParseCpuProfileError(text.to_owned()))
    }
}

/// What the processor computes is the baseline's, whole; what is around it is common to all hosts.
fn baseline(level: &[u32; CPU_WORDS], common: &CpuFeatures) -> CpuFeatures {
    let mut words = common.words;
    for (at, word) in words.iter_mut().enumerate() {
        *word = level[at] & !AROUND[at] | *word & AROUND[at];
    }
    CpuFeatures { words, ..*common }
}

const fn bits<const COUNT: usize>(bits: [u32; COUNT]) -> u32 {
    let (mut word, mut at) = (0, 0);
    while at < COUNT {
        word |= 1 << bits[at];
        at += 1;
    }
    word
}

/// Of every x86-64 processor, and the hypervisor's mark: FPU to SSE2 but machine checks' details, MTRR and what kernels take
/// for granted.
const EDX_1: u32 = bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
/// SYSCALL, NX, long mode, and what AMD repeats there.
const EDX_EXTENDED: u32 = bits([11, 20, 27, 29]);
/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; x2APIC, the deadline timer and "runs under a hypervisor", which KVM makes.
const ECX_1_LEVEL_2: u32 = bits([0, 9, 13, 19, 20, 21, 23, 24, 31]);
/// LAHF.
const ECX_EXTENDED_LEVEL_2: u32 = bits([0]);

const LEVEL_2: [u32; CPU_WORDS] =
    [ECX_1_LEVEL_2, EDX_1, 0, 0, 0, 0, 0, 0, 0, ECX_EXTENDED_LEVEL_2, EDX_EXTENDED, 0, 0];

/// With FMA, MOVBE, XSAVE, AVX, F16C; BMI1, AVX2, BMI2; x87, SSE and AVX state; LZCNT.
const LEVEL_3: [u32; CPU_WORDS] = [
    ECX_1_LEVEL_2 | bits([12, 22, 26, 28, 29]),
    EDX_1,
    0,
    bits([3, 5, 8]),
    0,
    0,
    0,
    bits([0, 1, 2]),
    0,
    ECX_EXTENDED_LEVEL_2 | bits([5]),
    EDX_EXTENDED,
    0,
    0,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn features(first: u32, kvm: u32, address_bits: u8) -> CpuFeatures {
        let mut words = LEVEL_3;
        words[0] |= first;
        words[12] = kvm;
        CpuFeatures { words, address_bits }
    }

    #[test]
    fn what_all_have_is_a_part_of_each() {
        let (one, other) = (features(1 << 25, 0b11, 48), features(1 << 30, 0b10, 40));
        let common = one.common(&other);
        assert_eq!((common.words[0], common.words[12], common.address_bits), (LEVEL_3[0], 0b10, 40));
        assert!(common.missing_in(&one).is_empty() && common.missing_in(&other).is_empty());
        assert_eq!(
            one.missing_in(&other),
            ["aes", "bit 0 of cpuid 0x40000001.0 eax", "48 bits of physical address"]
        );
    }

    #[test]
    fn profiles_are_what_their_names_say() {
        for profile in CpuProfile::ALL {
            assert_eq!(profile.as_str().parse(), Ok(profile));
        }
        assert!("x86-64-v9".parse::<CpuProfile>().is_err());
        let (host, common) = (features(1 << 25, 1, 48), features(0, 1, 40));
        let shown = |profile: CpuProfile| profile.resolve(&host, &common);
        assert_eq!((shown(CpuProfile::Host), shown(CpuProfile::HostCommon)), (host, common));
        let (two, three) = (shown(CpuProfile::Level2), shown(CpuProfile::Level3));
        assert!(two.missing_in(&three).is_empty(), "a higher level has all of the lower one");
        assert_eq!(three.missing_in(&two).first().map(String::as_str), Some("fma"));
        // Named by the psABI for v3, against those of /proc/cpuinfo.
        let lacking = three.missing_in(&two).join(" ");
        assert_eq!(
            lacking,
            "fma movbe xsave avx f16c bmi1 avx2 bmi2 bit 0 of cpuid 0xd.0 eax bit 1 of cpuid 0xd.0 eax bit 2 of cpuid 0xd.0 eax abm"
        );
        assert_eq!((two.words[12], two.address_bits), (1, 40), "the machine's part is common to all hosts");
    }

    #[test]
    fn a_guest_keeps_its_rate_where_it_is_the_same_or_can_be_scaled() {
        let host = |tsc_khz, scales_tsc| HostCpu { tsc_khz, scales_tsc, ..HostCpu::default() };
        assert!(host(2_000_000, false).keeps_tsc_at(&host(2_000_400, false)));
        assert!(!host(2_000_000, false).keeps_tsc_at(&host(2_100_000, false)));
        assert!(host(2_000_000, false).keeps_tsc_at(&host(2_100_000, true)));
        assert!(host(0, false).keeps_tsc_at(&host(2_100_000, false)));
    }

    #[test]
    fn an_old_host_lacks_a_level() {
        let old = CpuFeatures { words: LEVEL_2, address_bits: 40 };
        let shown = CpuProfile::Level3.resolve(&old, &old);
        assert!(shown.missing_in(&old).contains(&"avx2".to_owned()));
        assert!(CpuProfile::HostCommon.resolve(&old, &old).missing_in(&old).is_empty());
    }
}
