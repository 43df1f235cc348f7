//! What the command line accepts and refuses.

use super::*;
use clap::CommandFactory as _;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    // A quoted part keeps its blanks.
    let mut words: Vec<String> = vec!["poolctl".to_owned()];
    for (index, part) in line.split('"').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(ToOwned::to_owned));
        }
    }
    Cli::try_parse_from(words)
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

/// One line for each form of each command.
const MANUAL: &[&str] = &[
    "pool status",
    "pool show -o json",
    "-o wide pool show",
    "pool set replicas-default=2 cpu-overcommit=8",
    "pool set name=lab2 -o json",
    "pool set scrub-interval=7d scrub-rate=64MiB",
    "pool set scrub-interval=never",
    "pool ca rotate",
    "pool ca finish",
    "upgrade status -o json",
    "user renew",
    "user token create ann --role viewer",
    "user token create ann --role viewer --ttl 7d --out ci.toml",
    "user token list",
    "user token revoke token-9",
    "ha resume",
    "host token create",
    "host token create --ttl 3h -o json",
    "host token list",
    "host token revoke token-9",
    "host list -o yaml",
    "host show h1",
    "host remove h1 --force",
    "host remove h1",
    "host remove h1 --fewer-copies --async",
    "host watch",
    "host label h1 zone=a rack-",
    "host cordon h1",
    "host uncordon h1",
    "host drain h1",
    "host drain h1 --async",
    "host restore h1",
    "host confirm-dead h1",
    "host rekey h1",
    "host rekey h1 --ttl 10m -o json",
    "host forget h1",
    "pool backup pool.bak",
    "ha disarm",
    "ha arm",
    "ha plan --fail 2 -o json",
    "balance plan",
    "balance run --async",
    "group create web --rule apart --vm a --vm b",
    "group create licence --rule on-hosts --should --vm a --host h1",
    "group list",
    "group show web",
    "group add web --vm c",
    "group remove web --vm c",
    "group delete web",
    "cluster create fast --cpu-profile x86-64-v3",
    "cluster list",
    "cluster show fast",
    "cluster add fast --host h1 --host h2 --vm a",
    "cluster delete fast",
    "vm create a --vcpus 1 --memory 1GiB --cluster fast",
    "user create ann --role viewer --out ann.toml",
    "user list",
    "user role ann operator",
    "user rotate ann --out ann2.toml",
    "user delete ann",
    "user whoami",
    "support bundle pool.json",
    "vm explain a",
    "vm create a --vcpus 1 --memory 1GiB --ha-priority 200",
    "task wait task-20",
    "event audit --from 3",
    "volume create data --size 10GiB",
    "volume create data --size 10GiB --replicas 3",
    "volume list -o name",
    "volume show data",
    "vm clone web web2",
    "vm clone web web2 --full --async",
    "volume scrub data",
    "volume scrub data --replica h2 --rate 100MiB",
    "volume scrub data --async",
    "volume delete data",
    "image import probe ./probe",
    "image list",
    "image delete probe",
    "vm create a --vcpus 2 --memory 2GiB",
    "vm create a --vcpus 2 --memory 2GiB --disk d1 --disk d2 --kernel k --initrd i --cmdline \"x=1 y\" --ha none",
    "vm create a --vcpus 1 --memory 512MiB --kernel k --cmdline \"-v\"",
    "vm create a --vcpus 1 --memory 512MiB --disk d --cmdline quiet",
    "vm start a --host h2",
    "vm start a --async",
    "vm stop a --force --timeout 30s",
    "vm reboot a --force",
    "vm create a --vcpus 1 --memory 1GiB --disk d --cpu-profile x86-64-v3",
    "pool set cpu-profile=host-common",
    "vm reboot a --async",
    "vm pause a",
    "vm resume a",
    "vm list",
    "vm show a",
    "vm where a",
    "vm delete a",
    "vm migrate a --to h2 --policy must-finish --bandwidth 500MiB --downtime 30ms -o json",
    "vm migrate a --async",
    "vm migrate a --dry-run",
    "migration list",
    "migration show mig-21",
    "migration cancel 21",
    "migration plan a --to h2",
    "console log a --follow",
    "console serial a",
    "task list",
    "task show task-20",
    "task cancel 20",
    "task watch task-20",
    "event watch --from 7",
    "--config /tmp/x.toml event watch",
    "completion bash",
    "man",
];

#[test]
fn every_form_of_the_manual_is_accepted() {
    for line in MANUAL {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn bad_values_are_usage_errors_before_any_connection() {
    for line in [
        "vm",
        "vm fly a",
        "vm list -o xml",
        "volume create data",
        "volume create data --size ten",
        "volume create data --size 0",
        "volume create data --size 1GiB --replicas 0",
        "vm create a --vcpus 0 --memory 1GiB",
        "vm create a --vcpus -1 --memory 1GiB",
        "vm create a --vcpus 1 --memory 1XB",
        "vm create a --vcpus 1 --memory 1GiB --ha maybe",
        "vm migrate a --policy fast",
        "vm migrate a --downtime 30",
        "vm migrate a --bandwidth none",
        "vm migrate a --async --dry-run",
        "migration show vm-1",
        "task show x",
        "host token create --ttl 0s",
        "host token create --ttl 3",
        "host token revoke host-1",
        "event watch --from -1",
        "vm start a --timeout soon",
        "vm create a --vcpus 1 --memory 1GiB --ha-priority 0",
        "pool set",
        "pool set colour=blue",
        "pool set replicas-default=many",
        "user token create ann",
        "user token revoke vm-1",
        "host label h1",
        "host label h1 zone",
        "host label h1 =a",
        "ha plan --fail many",
        "group create web --vm a",
        "group create web --rule near --vm a",
        "user create ann --role king --out ann.toml",
        "user create ann --role viewer",
        "completion cobol",
    ] {
        let error = parse(line).map(|_| ()).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn values_arrive_as_what_they_mean() {
    let Noun::Vm(VmCommand::Migrate(migrate)) =
        parse("vm migrate a --bandwidth 500MiB --downtime 30ms").unwrap().noun
    else {
        panic!("not a migration");
    };
    assert_eq!(migrate.bandwidth, Some(proto::ByteCount(500 << 20)));
    assert_eq!(migrate.downtime, Some(Duration::from_millis(30)));
    let cli = parse("vm list -o json --timeout 5s").unwrap();
    assert_eq!(cli.global.output, Format::Json);
    assert_eq!(cli.global.timeout, Some(Duration::from_secs(5)));
}
