//! A fleet's report: runs of many machines are made, with and without a cause that is planted, and
//! the report must find just that.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::command::{Outcome, Project};
use crate::records;

/// A machine, as it is on a night.
#[derive(Clone)]
struct Host {
    name: String,
    gpu: &'static str,
    driver: &'static str,
    cublas: &'static str,
}

/// What a stage is on a machine, on a night.
#[derive(Clone)]
struct Answer {
    verdict: &'static str,
    why: String,
    /// Stands for the bits of the device arm.
    bits: u64,
    /// The algorithm's parts of K.
    parts: u32,
    /// z of the tightest claim.
    z: f64,
}

const FIRST: i64 = 1_793_836_800; // 2026-11-05T00:00:00Z

/// `2026-11-05` and so on.
fn day(night: usize) -> String {
    moment(night, 0)[..10].to_owned()
}

fn moment(night: usize, seconds: i64) -> String {
    let moment = FIRST + 86_400 * night as i64 + seconds;
    jiff::Timestamp::from_second(moment).expect("a moment").to_string()
}

/// Thirty machines with three kinds of GPU, or the first of them.
fn hosts(count: usize) -> Vec<Host> {
    let gpus = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"];
    let host = |at: usize| Host {
        name: format!("node{:02}", at + 1),
        gpu: gpus[at % 3],
        driver: "580.65 (CUDA 13.0)",
        cublas: "13.0.2",
    };
    (0..count).map(host).collect()
}

/// A sound answer: the same bits on each kind of GPU, and a z that does not move.
fn sound(host: &Host, stage: usize) -> Answer {
    Answer {
        verdict: "pass",
        why: "device = emulated, 0 of 2,048 values differ".to_owned(),
        bits: host.gpu.len() as u64 * 1000 + stage as u64,
        parts: 1,
        z: 0.95 + 0.001 * (stage % 20) as f64,
    }
}

fn digest(number: u64) -> String {
    format!("{number:064x}")
}

/// A run.json as a machine would leave it, with so many stages.
fn run_json(host: &Host, night: usize, stages: usize, answer: &dyn Fn(usize) -> Answer) -> String {
    let Host { name, gpu, driver, cublas } = host;
    let number = name.bytes().fold(0u64, |sum, byte| sum * 31 + u64::from(byte));
    let mut text = String::new();
    let verdicts = (0..stages).map(|stage| answer(stage).verdict);
    let gravest = verdicts.max_by_key(|verdict| usize::from(*verdict != "pass")).unwrap_or("pass");
    // Minutes after two, so that no two start together.
    let started = moment(night, 7200 + (number % 3600) as i64);
    write!(
        text,
        r#"{{"schema":1,"id":"{}","verdict":"{gravest}","exit_code":0,"interrupted":false,"started":"{started}","seconds":1.5,"folder":"stages","provenance":{{"runner":"0.1.0","command":["runner"],"platform":"linux x86_64","cpu":"Intel(R) Xeon(R) Processor","threads":16,"machine":"{name}"}},"series":{{"folder":"../stages","models":["synthetic:qwen2-tiny"],"selection":null}},"stages":["#,
        run_id(host, night)
    )
    .expect("written");
    for stage in 0..stages {
        let Answer { verdict, why, bits, parts, z } = answer(stage);
        if stage > 0 {
            text.push(',');
        }
        let (held, used) = if verdict == "pass" { ("held", 0.0) } else { ("falsified", 2.0) };
        let first = match verdict {
            "pass" => String::new(),
            _ => {
                r#""first":{"arm":"device","site":"blk.0.q","claim":"QKV-001","cause":"split-k"},"#
                    .to_owned()
            }
        };
        let versions = driver.bytes().chain(cublas.bytes());
        let versions = versions.fold(0u64, |sum, byte| sum * 7 % 99_991 + u64::from(byte));
        let key = number % 1_000_000 * 100_000_000 + versions * 1000 + stage as u64;
        write!(
            text,
            r#"
{{"id":"S{stage:02}","title":"t","file":"stages/s.toml","needs":[],"op":{{"matmul":{{"input":{{"stage":"D","site":"x"}},"weights":["blk.0.attn_q"]}}}},"model":"synthetic:qwen2-tiny","tokens":[791,374],"recipe":{{"gemm":"e4m3","scale":{{"weight":"tensor","activation":"tensor"}},"accumulate":"fast","output":"bf16","chip":"auto"}},"contract":["qkv-matmul","1.0.0"],"verdict":"{verdict}","why":"{why}",{first}"seconds":0.01,"arms":{{"reference":{{"state":"ran","why":"w","arithmetic":"f64","seconds":0.1,"key":"{}","machine":"{name}","object":null,"sites":[{{"site":"blk.0.q","shape":[2,256],"blake3":"{}"}}],"greedy":null}},"device":{{"state":"ran","why":"w","arithmetic":"hopper e4m3, fast; {gpu}, GPU 0, cuBLASLt {cublas}","gemms":[{{"shape":[16,256,256],"algorithm":"algorithm 66 tile 10 stages 36 split-K {parts} reduction 0","weights":["blk.0.attn_q.weight"]}}],"seconds":0.1,"key":"{}","machine":"{name}","gpu":"{gpu}","facts":{{"code":"{}","gpu":"{gpu}","which gpu":"GPU-{number:x}","driver":"{driver}","NVRTC":"13.0","cuBLASLt":"{cublas}"}},"object":null,"sites":[{{"site":"blk.0.q","shape":[2,256],"blake3":"{}"}},{{"site":"blk.0.k","shape":[2,128],"blake3":"{}"}}],"greedy":null}}}},"judgements":[{{"falsifier":"QKV-001","equation":"exact","prediction":"p","compare":["device","emulated"],"metric":"bit_mismatches","min":null,"max":0.0,"why":"w","if_fails":"structural","outcome":"{held}","reason":null,"site":"blk.0.q","value":{used},"used":{used},"sites_judged":3,"sites_falsified":0,"sites_unmeasured":0,"sites":null}},{{"falsifier":"QKV-004","equation":"floor","prediction":"p","compare":["device","reference"],"metric":"z_rms","min":0.8,"max":1.25,"why":"w","if_fails":"drift","outcome":"held","reason":null,"site":"blk.0.q","value":{z},"used":{},"sites_judged":3,"sites_falsified":0,"sites_unmeasured":0,"sites":null}}],"measures":[],"greedy":[]}}"#,
            digest(7_000_000 + stage as u64),
            digest(8_000_000 + stage as u64),
            digest(key),
            digest(42),
            digest(bits),
            digest(bits + 500),
            z / 1.25
        )
        .expect("written");
    }
    text.push_str("\n]}\n");
    text
}

fn run_id(host: &Host, night: usize) -> String {
    let number = host.name.bytes().fold(7u32, |sum, byte| sum.wrapping_mul(33) + u32::from(byte));
    format!("{}T020000Z-{number:08x}", day(night).replace('-', ""))
}

/// Writes a run where a machine keeps its own: `fleet/NAME/runs/ID`.
fn put(place: &Path, host: &Host, night: usize, stages: usize, answer: &dyn Fn(usize) -> Answer) {
    let folder = place.join(&host.name).join("runs").join(run_id(host, night));
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("run.json"), run_json(host, night, stages, answer)).expect("written");
}

/// What becomes of a machine and of its answer on a night.
type Plant<'p> = &'p dyn Fn(&mut Host, usize) -> Option<Answer>;

/// A fleet over some nights; `plant` gives another answer than the sound one, for all stages.
fn fleet(hosts: &[Host], nights: usize, stages: usize, plant: Plant<'_>) -> Project {
    let project = Project::new();
    for night in 0..nights {
        for host in hosts {
            let mut host = host.clone();
            let other = plant(&mut host, night);
            let answer = |stage: usize| {
                let own = sound(&host, stage);
                other.clone().map_or(own.clone(), |other| Answer {
                    bits: own.bits + other.bits,
                    z: if other.z == 0.0 { own.z } else { other.z },
                    ..other
                })
            };
            put(&project.path("fleet"), &host, night, stages, &answer);
        }
    }
    project
}

/// The report of all runs of a project, a few hours after the last night.
fn reported(project: &Project, nights: usize, more: &[&str]) -> Outcome {
    let at = moment(nights - 1, 10 * 3600);
    let mut arguments = vec!["fleet", "report", "fleet", "--at", &at];
    arguments.extend(more);
    project.runner(&arguments)
}

fn json_of(project: &Project, nights: usize, code: i32) -> Value {
    let told = reported(project, nights, &["--format", "json"]).expect(code, "");
    serde_json::from_str(&told.out).expect("JSON")
}

/// A falsified stage with other bits.
fn falsified() -> Answer {
    let why = "QKV-001 at blk.0.q: bit_mismatches of device against emulated is 2, above 0";
    Answer { verdict: "structural", why: why.to_owned(), bits: 77_000, parts: 4, z: 0.0 }
}

/// Three machines with an H200 get a newer library on the eighth night and later.
fn newer_library(host: &mut Host, night: usize) -> Option<Answer> {
    let since = match host.name.as_str() {
        "node03" => 7,
        "node06" | "node12" => 8,
        _ => return None,
    };
    (night >= since).then(|| {
        host.cublas = "13.1.0";
        falsified()
    })
}

#[test]
fn runs_that_are_made_here_are_runs() {
    let project = fleet(&hosts(1), 1, 2, &|_, _| Some(falsified()));
    let folder = project.path("fleet/node01/runs").join(run_id(&hosts(1)[0], 0));
    let run = runner::record::RunRecord::read(&folder).expect("a run");
    assert_eq!(run.stages.len(), 2);
    let json = serde_json::to_value(&run).expect("JSON");
    assert_eq!(records::unknown_places(&json), BTreeSet::new());
}

#[test]
fn a_planted_cause_is_found_with_its_machines_and_its_first_night() {
    let project = fleet(&hosts(15), 10, 3, &newer_library);
    let report = json_of(&project, 10, 1);
    let findings = report["findings"].as_array().expect("findings");
    assert_eq!(findings.len(), 1, "{report:#}");
    let finding = &findings[0];
    let since = |name: &str, night: usize| json!({ "machine": name, "since": day(night) });
    let machines = json!([since("node03", 7), since("node06", 8), since("node12", 8)]);
    assert_eq!(finding["machines"], machines);
    assert_eq!(finding["since"], day(7));
    assert_eq!(finding["others"], 12);
    assert_eq!(finding["tie"], false);
    assert_eq!(finding["new"], false);
    assert_eq!(finding["verdicts"].as_array().map(Vec::len), Some(3));
    assert_eq!(finding["bits"][0], json!({ "stage": "S00", "arm": "device", "first": "blk.0.q" }));
    let cause = &finding["causes"][0];
    assert_eq!(cause["facts"][0]["name"], "cuBLASLt");
    assert_eq!(cause["facts"][0]["values"], json!(["13.1.0"]));
    assert_eq!(cause["facts"][0]["instead_of"], json!(["13.0.2"]));
    assert_eq!([&cause["known_before"], &cause["came_with_it"]], [3, 3]);
    assert_eq!([&cause["weak"], &cause["chosen"]], [false, false]);
    // What the library chose is told as what follows.
    let causes = finding["causes"].as_array().expect("causes");
    let chosen: Vec<&Value> = causes.iter().filter(|cause| cause["chosen"] == true).collect();
    let names: Vec<&Value> = chosen.iter().map(|cause| &cause["facts"][0]["name"]).collect();
    assert_eq!(names, ["algorithm of 16x256x256", "split-K of 16x256x256"]);
    assert_eq!(chosen[1]["facts"][0]["values"], json!(["4"]));
    // Two kinds of GPU with the same cause are one finding: nobody is the odd one of five H200s.
    assert_eq!(finding["bits"].as_array().map(Vec::len), Some(3));
    // No fact of one machine alone, and none that all have.
    assert_eq!(causes.len(), 3, "{causes:#?}");
    assert_eq!(report["unsteady"], json!([]), "another library is another key");
}

#[test]
fn the_text_of_a_report() {
    let mut hosts = hosts(9);
    hosts[8].name = "node09".to_owned();
    let project = fleet(&hosts, 10, 2, &|host, night| {
        if host.name == "node06" && night >= 8 {
            host.driver = "585.10 (CUDA 13.1)";
            return Some(falsified());
        }
        if host.gpu.contains("H100") && night >= 4 {
            return Some(Answer { z: 1.11, ..sound(host, 0) }).map(|a| Answer { bits: 0, ..a });
        }
        None
    });
    for night in 8..10 {
        fs::remove_dir_all(project.path("fleet/node09/runs").join(run_id(&hosts[8], night)))
            .expect("removed");
    }
    let damaged = project.path("fleet/node01/runs").join(run_id(&hosts[0], 3)).join("run.json");
    fs::write(&damaged, "{\"schema\": 1, \"sta").expect("written");
    let more = ["--expect", "node01,node77", "--html", "fleet.html", "--notify", "cat > told.json"];
    let told = reported(&project, 10, &more);
    assert_eq!(told.code, Some(1), "{}", told.err);
    // The examples of the docs are this report, and its message.
    let docs = include_str!("../../docs/fleet.md");
    assert!(docs.contains(&told.out), "docs/fleet.md shows another text than\n{}", told.out);
    let block = docs.split("```json\n").nth(1).and_then(|rest| rest.split("```").next());
    let mut shown: Value = serde_json::from_str(block.expect("an example")).expect("JSON");
    let notice: Value = serde_json::from_str(&project.read("told.json")).expect("JSON");
    shown["page"] = notice["page"].clone();
    assert_eq!(shown, notice);
    insta::assert_snapshot!("the_text_of_a_fleet", told.out);
}

#[test]
fn a_fleet_without_a_difference_reports_none() {
    let project = fleet(&hosts(12), 6, 3, &|_, _| None);
    let told =
        reported(&project, 6, &[]).expect(0, "fleet of 12 machines: pass; no machine differs");
    assert!(!told.out.contains("separates") && !told.out.contains("no report"), "{}", told.out);
    let report = json_of(&project, 6, 0);
    for empty in ["findings", "failing", "unsteady", "missing", "left_out"] {
        assert_eq!(report[empty], json!([]), "{empty}");
    }
    let kinds: BTreeSet<&str> = report["trends"]
        .as_array()
        .expect("trends")
        .iter()
        .filter_map(|trend| trend["kind"].as_str())
        .collect();
    assert_eq!(kinds, BTreeSet::from(["flat"]));
    assert_eq!(unknown_in(&report), BTreeSet::new());
}

#[test]
fn a_gpu_that_is_gone_is_told_although_its_stages_pass() {
    let project = fleet(&hosts(6), 4, 1, &|_, _| None);
    for night in 2..4 {
        let file = format!("fleet/node04/runs/{}/run.json", run_id(&hosts(6)[3], night));
        let text = project.read(&file);
        let start = text.find("\"device\":{").expect("an arm");
        let end = text.find("},\"judgements\"").expect("its end");
        let gone = r#""device":{"state":"unmeasured","why":"no CUDA device: the driver does not start","arithmetic":null,"seconds":null,"key":null,"object":null,"sites":[],"greedy":null}"#;
        project.write(&file, &format!("{}{gone}{}", &text[..start], &text[end..]));
    }
    let report = json_of(&project, 4, 0);
    let finding = &report["findings"][0];
    assert_eq!(finding["machines"], json!([{ "machine": "node04", "since": day(2) }]));
    let why = "no CUDA device: the driver does not start";
    assert_eq!(finding["arms"], json!([{ "stage": "S00", "arm": "device", "why": why }]));
    let told = reported(&project, 4, &[]);
    told.expect(0, "no result of device in S00: no CUDA device: the driver does not start");
    assert_eq!(unknown_in(&report), BTreeSet::new());
}

#[test]
fn what_has_one_cause_on_several_kinds_of_gpus_is_one_finding() {
    let project = fleet(&hosts(12), 4, 2, &|host, night| {
        let newer = ["node02", "node03"].contains(&host.name.as_str()) && night > 1;
        newer.then(|| {
            host.driver = "585.10 (CUDA 13.1)";
            Answer { bits: 7, ..sound(host, 0) }
        })
    });
    let report = json_of(&project, 4, 1);
    let findings = report["findings"].as_array().expect("findings");
    assert_eq!(findings.len(), 1, "{report:#}");
    assert_eq!(findings[0]["verdicts"], json!([]));
    assert_eq!(findings[0]["machines"].as_array().map(Vec::len), Some(2));
    assert_eq!(findings[0]["bits"].as_array().map(Vec::len), Some(2));
    let cause = &findings[0]["causes"][0];
    assert_eq!(cause["facts"][0]["values"], json!(["585.10 (CUDA 13.1)"]));
    assert_eq!([&cause["of"], &cause["others"], &cause["came_with_it"]], [2, 6, 2]);
    assert_eq!([&report["verdict"], &report["exit_code"]], [&json!("pass"), &json!(1)]);
}

#[test]
fn two_facts_that_only_together_separate_are_found_as_a_pair() {
    // Of the H100s those with the newer driver differ; others have that driver too, and do not.
    let project = fleet(&hosts(12), 3, 2, &|host, _| {
        let number: usize = host.name[4..].parse().expect("a number");
        if number > 6 {
            host.driver = "585.10 (CUDA 13.1)";
        }
        (host.gpu.contains("H100") && number > 6).then(|| Answer {
            verdict: "drift",
            parts: 1,
            ..falsified()
        })
    });
    let report = json_of(&project, 3, 1);
    let finding = &report["findings"][0];
    let facts: Vec<&Value> = finding["causes"][0]["facts"]
        .as_array()
        .expect("facts")
        .iter()
        .map(|fact| &fact["name"])
        .collect();
    assert_eq!(facts, ["gpu", "driver"], "{finding:#}");
    assert_eq!(finding["causes"][0]["known_before"], 0, "it was so from the first night on");
}

#[test]
fn where_nothing_separates_them_no_cause_is_claimed() {
    // Two machines that have nothing in common but with others.
    let project = fleet(&hosts(12), 3, 2, &|host, _| {
        ["node01", "node04"]
            .contains(&host.name.as_str())
            .then(|| Answer { parts: 1, ..falsified() })
    });
    let report = json_of(&project, 3, 1);
    let finding = &report["findings"][0];
    assert_eq!(finding["causes"], json!([]), "{finding:#}");
    reported(&project, 3, &[]).expect(1, "nothing separates them; nearest is gpu NVIDIA A100");
}

#[test]
fn one_machine_against_one_shows_nothing_and_says_so() {
    let mut pair = hosts(2);
    pair[1].gpu = pair[0].gpu;
    pair[1].driver = "585.10 (CUDA 13.1)";
    let project = fleet(&pair, 1, 1, &|host, _| {
        (host.name == "node02").then(|| Answer { bits: 5, ..sound(host, 0) })
    });
    let told = reported(&project, 1, &[]).expect(1, "1 of 2 machines differs: node02");
    for words in [
        "one machine against one: whatever differs between them fits, so this shows nothing",
        "as many have the one as the other: nobody knows who is the odd one",
        "other bits of device in S00, first at blk.0.q",
        "perhaps driver 585.10",
    ] {
        assert!(told.out.contains(words), "no `{words}` in {}", told.out);
    }
}

#[test]
fn bits_are_held_against_each_other_on_the_same_kind_of_gpu_alone() {
    // Every kind has bits of its own, as `sound` makes them, and nobody differs.
    let report = json_of(&fleet(&hosts(6), 2, 1, &|_, _| None), 2, 0);
    assert_eq!(report["findings"], json!([]));
}

#[test]
fn other_bits_of_the_same_key_on_the_same_machine_are_told() {
    let project = fleet(&hosts(6), 5, 1, &|host, night| {
        (host.name == "node02" && night == 2).then(|| Answer { bits: 9, ..sound(host, 0) })
    });
    let report = json_of(&project, 5, 1);
    assert_eq!(report["findings"], json!([]), "it is over");
    let expected = json!([{ "machine": "node02", "arm": "device", "stages": ["S00"], "times": 2,
        "first": day(2), "last": day(3) }]);
    assert_eq!(report["unsteady"], expected);
}

#[test]
fn a_machine_that_does_not_report_is_told_by_its_own_pace() {
    let project = fleet(&hosts(4), 15, 1, &|_, _| None);
    // node02 reports once a week, node03 has stopped, node04 is gone for good.
    for night in 0..15 {
        let gone = |host: usize| {
            let folder = project.path(&format!("fleet/node{host:02}/runs"));
            fs::remove_dir_all(folder.join(run_id(&hosts(4)[host - 1], night))).expect("removed");
        };
        if night % 7 != 0 {
            gone(2);
        }
        if night > 9 {
            gone(3);
            gone(4);
        }
    }
    let told = reported(&project, 15, &["--without", "node04"]);
    let told =
        told.expect(4, "fleet of 3 machines: error; no machine differs; no report of node03");
    assert!(
        told.out.contains("it reports every 24 h, so one was due on 2026-11-15T02:"),
        "{}",
        told.out
    );
    let report = json_of(&project, 15, 4);
    let names: Vec<&Value> =
        report["missing"].as_array().expect("missing").iter().map(|m| &m["machine"]).collect();
    assert_eq!(names, ["node03", "node04"]);
    let expecting =
        reported(&project, 15, &["--expect", "node01,node99", "--without", "node03,node04"]);
    expecting.expect(4, "node99  it is expected, and there is no run of it");
}

#[test]
fn what_cannot_be_read_is_named_and_left_out() {
    let hosts = hosts(4);
    let project = fleet(&hosts, 3, 1, &|_, _| None);
    let own = |host: usize, night: usize| {
        let runs = format!("fleet/{}/runs/{}", hosts[host].name, run_id(&hosts[host], night));
        format!("{runs}/run.json")
    };
    let whole = project.read(&own(0, 0));
    project.write(&own(0, 0), &whole[..whole.len() / 2]);
    project.write(&own(0, 1), &whole.replace("\"schema\":1", "\"schema\":9"));
    project
        .write(&own(1, 0), &whole.replace(",\"machine\":\"node01\"},\"series\"", "},\"series\""));
    project.write(&own(1, 1), &whole.replace("\"interrupted\":false", "\"interrupted\":true"));
    project.write(&own(2, 0), &whole.replace(&moment(0, 0)[..11], "2126-01-01T"));
    project.write(&own(2, 1), &whole.replace("\"verdict\":\"pass\"", "\"verdict\":\"fine\""));
    project.write(&own(3, 0), "\u{fffd}");
    let told = reported(&project, 3, &[]).expect(0, "7 files left out");
    for words in [
        "is not a whole run.json",
        "with schema 9",
        "does not name its machine",
        "the run was stopped",
        "is the clock of node01 right?",
        "unknown variant `fine`",
    ] {
        assert!(told.out.contains(words), "no `{words}` in {}", told.out);
    }
    let report = json_of(&project, 3, 0);
    assert_eq!(report["left_out"].as_array().map(Vec::len), Some(7));
    assert_eq!(report["runs"], 5);
}

#[test]
fn a_place_that_holds_no_run_is_an_error_that_names_it() {
    let project = Project::new();
    let told = project.runner(&["fleet", "report"]);
    told.expect(2, "cannot read `runs`: No such file or directory");
    project.write("empty/notes", "");
    project.runner(&["fleet", "report", "empty"]).expect(2, "`empty` holds no run");
    project.write("broken/a/run.json", "{}");
    let told = project.runner(&["fleet", "report", "broken", "--notify", "cat > told.json"]);
    told.expect(2, "no run in `broken` can be taken");
    let notice: Value = serde_json::from_str(&project.read("told.json")).expect("JSON");
    assert_eq!([&notice["exit_code"], &notice["verdict"]], [&json!(2), &json!("error")]);
    let old = fleet(&hosts(1), 1, 1, &|_, _| None);
    reported(&old, 200, &[]).expect(2, "all 1 are older than 90 nights");
}

#[test]
fn names_of_strangers_are_shown_and_not_obeyed() {
    const EVIL: &str = "<script>alert(1)</script>\\u001b[2J\\n::error::\\u202e\\\"";
    let mut hosts = hosts(3);
    hosts[1].name = "evil".to_owned();
    let project = fleet(&hosts, 4, 2, &|host, night| {
        (host.name == "evil" && night > 1).then(|| Answer { why: "w".to_owned(), ..falsified() })
    });
    for night in 0..4 {
        let file = format!("fleet/evil/runs/{}/run.json", run_id(&hosts[1], night));
        let text = project.read(&file);
        let text = text.replace("\"evil\"", &format!("\"{EVIL}\""));
        let text = text
            .replace("\"0.1.0\"", &format!("\"{EVIL}\""))
            .replace("\"w\"", &format!("\"{EVIL}\""));
        let text = text.replace("580.65", EVIL).replace("S01", EVIL).replace("QKV-004", EVIL);
        project.write(&file, &text.replace("blk.0.q", EVIL).replace("synthetic:", EVIL));
    }
    for format in ["text", "json", "html", "openmetrics"] {
        let told = reported(&project, 4, &["--format", format]).expect(1, "");
        assert!(told.out.contains("alert(1)"), "{format}: {}", told.out);
        let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!told.out.contains(obeyed), "{format}: {:?}", told.out);
        assert!(!told.out.lines().any(|line| line.starts_with("::error::")), "{format}");
        match format {
            "html" => assert!(!told.out.contains("<script>alert"), "{}", told.out),
            "openmetrics" => {
                let label = "machine=\"<script>alert(1)</script>";
                let line = told.out.lines().find(|line| line.contains(label)).expect("a line");
                assert!(line.contains("\\\""), "{line}");
            }
            _ => {}
        }
    }
}

#[test]
fn one_message_for_the_fleet_and_metrics_with_its_hosts() {
    let project = fleet(&hosts(15), 9, 2, &newer_library);
    let all = [
        "--notify",
        "cat > told.json; echo $RUNNER_VERDICT >> calls; exit 3",
        "--html",
        "fleet.html",
        "--json",
        "fleet.json",
        "--metrics",
        "fleet.prom",
        "--out",
        "fleet.txt",
    ];
    let told = reported(&project, 9, &all).expect(1, "warning: --notify");
    assert_eq!(told.out, "");
    assert_eq!(project.read("calls"), "structural\n", "one message");
    let notice: Value = serde_json::from_str(&project.read("told.json")).expect("JSON");
    assert_eq!(notice["machines"], 15);
    assert_eq!(notice["findings"].as_array().map(Vec::len), Some(1), "{notice:#}");
    let line = notice["line"].as_str().expect("a line");
    assert!(line.contains("3 machines differ (1 finding)"), "{line}");
    assert!(line.contains("cuBLASLt 13.1.0"), "{line}");
    assert_eq!(notice["page"], project.path("fleet.html").display().to_string());
    assert!(project.read("fleet.txt").starts_with("fleet of 15 machines: structural"));
    let report: Value = serde_json::from_str(&project.read("fleet.json")).expect("JSON");
    assert_eq!(unknown_in(&report), BTreeSet::new());
    let metrics = project.read("fleet.prom");
    for line in [
        "runner_fleet_stage_verdict{machine=\"node03\",stage=\"S00\",verdict=\"structural\"} 1",
        "runner_fleet_stage_verdict{machine=\"node01\",stage=\"S00\",verdict=\"pass\"} 1",
        "runner_fleet_stage_differs{machine=\"node03\",stage=\"S00\"} 1",
        "runner_fleet_machine_reported{machine=\"node15\"} 1",
        "runner_fleet_findings 1",
        "runner_fleet_exit_code 1",
    ] {
        assert!(metrics.lines().any(|known| known == line), "no `{line}`");
    }
    assert!(metrics.ends_with("# EOF\n"));
}

/// The places of a report that docs/fleet.schema.json says nothing about.
fn unknown_in(report: &Value) -> BTreeSet<String> {
    let text = include_str!("../../docs/fleet.schema.json");
    let schema: Value = serde_json::from_str(text).expect("JSON");
    let mut unknown = BTreeSet::new();
    records::walk(&schema, &schema, report, "", &mut unknown);
    unknown
}

#[test]
fn the_page_of_thirty_machines_thirty_stages_and_ninety_nights_is_small() {
    let project = fleet(&hosts(30), 90, 30, &|host, night| {
        let since = if host.gpu.contains("H200") { 60 } else { 75 };
        let differs = host.name.ends_with('3') || host.name.ends_with('6');
        (differs && night >= since).then(|| {
            host.cublas = "13.1.0";
            Answer { z: 1.0 + night as f64 / 1000.0, ..falsified() }
        })
    });
    let begun = std::time::Instant::now();
    reported(&project, 90, &["--html", "report.html"]).expect(1, "2700 runs of 30 stages");
    let took = begun.elapsed();
    let page = project.read("report.html");
    println!("{} bytes of page, {} s for 2,700 runs", page.len(), took.as_secs_f64());
    assert!(page.len() < 3_000_000, "{} bytes", page.len());
    assert!(took.as_secs() < 60, "{took:?}");
    // `npm test --prefix tests/browser` opens it.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fleet");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("report.html"), page).expect("written");
}

#[test]
fn a_diff_of_two_machines_names_the_facts_that_differ() {
    let mut pair = hosts(2);
    pair[1].gpu = pair[0].gpu;
    let project = fleet(&pair, 1, 2, &|host, _| {
        (host.name == "node02").then(|| {
            (host.driver, host.cublas) = ("585.10 (CUDA 13.1)", "13.1.0");
            falsified()
        })
    });
    let [a, b] =
        [0, 1].map(|host| format!("fleet/{}/runs/{}", pair[host].name, run_id(&pair[host], 0)));
    let told = project.runner(&["diff", &a, &b]).expect(1, "causes");
    for line in [
        "S00, S01  device cuBLASLt: 13.0.2 -> 13.1.0",
        "S00, S01  device driver: 580.65 (CUDA 13.0) -> 585.10 (CUDA 13.1)",
        "S00, S01  device algorithm of 16x256x256: algorithm 66",
        " on node01, GPU-",
    ] {
        assert!(told.out.contains(line), "no `{line}` in {}", told.out);
    }
    assert!(!told.out.contains("which gpu"), "{}", told.out);
    let told = project.runner(&["diff", &a, &b, "--format", "json"]).expect(1, "");
    let told: Value = serde_json::from_str(&told.out).expect("JSON");
    assert_eq!(told["before"]["machine"], "node01");
    assert_eq!(told["after"]["verdict"], "structural");
    let changes = told["changes"].as_array().expect("changes");
    let of = |topic: &'static str| changes.iter().filter(move |change| change["topic"] == topic);
    let cublas = of("environment").find(|c| c["what"] == "device cuBLASLt" && c["stage"] == "S01");
    let cublas = cublas.expect("the library of each stage");
    assert_eq!((&cublas["before"], &cublas["after"]), (&"13.0.2".into(), &"13.1.0".into()));
    assert!(cublas.get("explained").is_none(), "a cause is explained by nothing");
    let mut numbers = of("claim").chain(of("measure")).peekable();
    assert!(numbers.peek().is_some());
    assert!(numbers.all(|change| change["explained"] == true), "another library explains them");
}

#[test]
fn history_takes_the_folders_of_many_machines() {
    let project = fleet(&hosts(3), 4, 1, &|_, _| None);
    let told = project.runner(&["history", "--runs", "fleet", "--last", "12"]);
    let told = told.expect(0, "S00 pass x 12");
    let machines: Vec<&str> =
        told.out.lines().take(12).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(machines.len(), 12);
    assert_eq!(machines.iter().collect::<BTreeSet<_>>().len(), 3, "{}", told.out);
    let two = ["history", "--runs", "fleet/node01/runs", "--runs", "fleet/node02/runs"];
    project.runner(&two).expect(0, "S00 pass x 8");
    project.runner(&["history", "--machines", "--runs", "fleet"]).expect(0, "has the same bits");
    let json = |arguments: &[&str]| -> Value {
        let told = project.runner(&[arguments, &["--format", "json", "--runs", "fleet"]].concat());
        serde_json::from_str(&told.expect(0, "").out).expect("JSON")
    };
    let told = json(&["history", "--last", "5"]);
    let runs = told["runs"].as_array().expect("runs");
    assert_eq!((told["schema"].as_u64(), runs.len()), (Some(1), 5));
    let points = told["stages"][0]["runs"].as_array().expect("a stage's runs");
    for (run, point) in runs.iter().zip(points) {
        assert_eq!(run["run"], point["run"]);
        assert_eq!(point["verdict"], "pass");
        assert!(point["value"].is_number() && point["metric"].is_string(), "{point}");
    }
    let told = json(&["history", "--machines"]);
    for arm in told["arms"].as_array().expect("arms") {
        let asked = arm["asked"].as_array().expect("questions");
        let groups = asked.iter().flat_map(|groups| groups.as_array().expect("groups"));
        assert!(groups.clone().all(|group| group["first"].is_null()), "all have the same bits");
    }
}

#[cfg(feature = "remote")]
#[test]
fn a_report_of_a_store_is_that_of_a_folder_with_the_same_runs() {
    let project = fleet(&hosts(4), 3, 2, &|_, _| None);
    let whole = |report: Outcome| -> Value {
        serde_json::from_str(&report.expect(0, "").out).expect("JSON")
    };
    let at = moment(2, 10 * 3600);
    let report =
        |place: &str| project.runner(&["fleet", "report", place, "--at", &at, "--format", "json"]);
    let url = format!("file://{}", project.path("fleet").display());
    let (of_folder, of_store) = (whole(report("fleet")), whole(report(&url)));
    assert_eq!(of_store["machines"], of_folder["machines"]);
    assert_eq!(of_store["findings"], of_folder["findings"]);
    report("file:///nonexistent/fleet").expect(2, "is no folder");
    fs::create_dir(project.path("empty")).expect("made");
    let empty = format!("file://{}", project.path("empty").display());
    report(&empty).expect(2, "holds no run of the last");
}
