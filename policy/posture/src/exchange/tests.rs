#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{SourceFile, parse};

fn group() -> Group {
    let text = r#"
version: 1
security_groups:
  web:
    description: Public web servers
    ingress:
      - { ports: [80, "port-list:web-ports"], from: [any, "group:lb"], description: "a \"quoted\", =text" }
      - { protocol: udp, ports: 53, source_ports: [1024/65535], from: 10.0.0.0/8, to: 10.1.0.1, priority: 100, policy: drop }
      - { protocol: icmp, from: any, description: "=cmd|' /C calc'!A0" }
      - { protocol: 132, from: prefix-list:office, description: "'=twice" }
    egress:
      - { protocol: all, to: "2001:db8::/32", from: fd00::/64 }
"#;
    parse(&[SourceFile::new("t", text)]).unwrap().groups.remove(0)
}

#[test]
fn what_was_exported_imports_as_the_same_single_rules() {
    let group = group();
    let expected = singles(&group);
    assert_eq!(expected.len(), 6 + 1 + 1 + 1 + 1);
    assert_eq!(from_json(&to_json(&group)).unwrap(), expected);
    assert_eq!(from_csv(&to_csv(&group)).unwrap(), expected);
    assert_eq!(from_csv(&format!("\u{feff}{}", to_csv(&group).replace("\r\n", "\n"))).unwrap(), expected);
}

#[test]
fn no_cell_begins_like_a_formula() {
    for line in to_csv(&group()).lines() {
        let mut records = line.split(',').map(|cell| cell.trim_start_matches('"'));
        assert!(records.all(|cell| !cell.starts_with(['=', '+', '-', '@'])), "{line}");
    }
    assert!(to_csv(&group()).contains("'=cmd|") && to_csv(&group()).contains("'-1/-1"));
}

#[test]
fn errors_name_row_and_column() {
    let csv = "Direction,IpProtocol,PortRange,SourceCidrIp,Priority\n\
               ingress,TCP,80/80,0.0.0.0/0,1\n\
               ingress,TCP,200/1,0.0.0.0/0,1\n\
               sideways,TPC,80/80,10.0.0.7/24,110\n\
               ingress,TCP,-1/-1,0.0.0.0/0,1\n\
               ingress,ICMP,-1/-1,,1\n";
    let errors: Vec<String> = from_csv(csv).unwrap_err().iter().map(ToString::to_string).collect();
    assert_eq!(
        errors[0],
        "row 3, column PortRange: `200/1` is reversed; expected the lower port first; did you mean `1/200`?"
    );
    assert_eq!(errors[1], "row 4, column Direction: expected ingress or egress");
    assert_eq!(errors[2], "row 4, column Priority: `110` is not from 1 to 100");
    assert!(errors[3].starts_with("row 4, column IpProtocol: `TPC`") && errors[3].ends_with("did you mean `tcp`?"));
    assert!(
        errors
            .iter()
            .any(|e| e == "row 5, column PortRange: -1/-1 is for protocols without ports; every port is 1/65535")
    );
    assert!(errors.iter().any(|e| e.starts_with("row 6, column SourceCidrIp: the rule names no peer")));
}

#[test]
fn broken_files_are_refused_and_none_is_half_read() {
    for (csv, why) in [
        ("", "the file is empty"),
        ("Direction\n", "row 1, column IpProtocol: the column is missing"),
        ("Direction,IpProtocol,Portrang\n", "did you mean `PortRange`?"),
        ("Direction,IpProtocol,Direction\n", "the column stands twice"),
        ("Direction,IpProtocol\ningress\n", "row 2: the row has 1 cells and the header 2"),
        ("Direction,IpProtocol\n\"ingress,TCP\n", "does not end"),
        ("Direction,IpProtocol\n\"ingress\"x,TCP\n", "behind the closing quote"),
        ("Direction,IpProtocol\ning\"ress,TCP\n", "a quote stands in the bare cell"),
    ] {
        let errors = from_csv(csv).unwrap_err();
        assert!(errors[0].to_string().contains(why), "{csv:?}: {}", errors[0]);
    }
    for (json, why) in [
        ("{", "not valid JSON"),
        ("{}", "expected a list of rules"),
        ("[1]", "row 1: expected an object"),
        (r#"[{"Direction":"ingress","Sauce":"x"}]"#, "unknown field `Sauce`"),
        (r#"[{"Direction":["ingress"]}]"#, "expected a text or a number"),
        (r#"[{"Direction":"ingress","IpProtocol":"ICMP","Ipv6SourceCidrIp":"::/0"}]"#, "did you mean `icmpv6`?"),
        (
            r#"[{"Direction":"ingress","IpProtocol":"ALL","SourceCidrIp":"0.0.0.0/0","Ipv6SourceCidrIp":"::/0"}]"#,
            "one family",
        ),
        (
            r#"[{"Direction":"ingress","IpProtocol":"ALL","SourceGroupId":"web","SourceGroupOwnerId":7}]"#,
            "other accounts",
        ),
    ] {
        let errors = from_json(json).unwrap_err();
        assert!(errors[0].to_string().contains(why), "{json}: {}", errors[0]);
    }
}

#[test]
fn two_hundred_rules_import_and_one_more_does_not() {
    let row = "ingress,TCP,80/80,0.0.0.0/0\n";
    let file = |rows: usize| format!("Direction,IpProtocol,PortRange,SourceCidrIp\n{}", row.repeat(rows));
    assert_eq!(from_csv(&file(200)).unwrap().len(), 200);
    assert_eq!(from_csv(&file(201)).unwrap_err()[0].message, "more than 200 rules; import them in parts");
}

#[test]
fn what_the_cloud_exports_is_read_with_its_extra_fields() {
    let json = r#"{"SecurityGroupId":"sg-x","Permissions":{"Permission":[{"CreateTime":"2026-01-01T00:00:00Z",
        "SecurityGroupRuleId":"sgr-1","SourceGroupName":"","Direction":"ingress","IpProtocol":"TCP","PortRange":"22/22",
        "SourceCidrIp":"10.0.0.1","SourceGroupId":"ignored","Policy":"Accept","Priority":5,"NicType":"intranet","Description":""}]}}"#;
    let rules = from_json(json).unwrap();
    assert_eq!(rules[0].1.peers[0].to_string(), "10.0.0.1/32");
    assert_eq!(rules[0].1.priority, 5);
}
