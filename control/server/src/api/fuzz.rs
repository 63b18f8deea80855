//! Every request body on foreign bytes, for the fuzzer.

use keepwall_api::operations::operations;
use keepwall_api::{
    FileText, GroupSpec, InstanceChange, InstanceSpec, Login, NewKey, NewServiceAccount, NewUser, OidcFinish,
    OidcStart, PasswordChange, PortListSpec, PostureChange, PostureFile, PostureQuestion, PrefixListSpec, ReturnChange,
    RuleEdit, RuleSpec, ServiceAccountChange, TokenSpec, TotpCode, TotpEnrol, UserChange,
};
use keepwall_secgroup::spec::Direction;
use serde::de::DeserializeOwned;

use super::call::parse;
use super::views::{self, RuleWork, Section};

/// A posture to put parts into.
const POSTURE: &str = "version: 1\nsecurity_groups:\n  web:\n    ingress:\n      - { policy: accept, protocol: tcp, ports: 443, from: any }\n";

/// Reads `bytes` as the body of operation number `which`, and does with it what needs no store. Never panics.
pub fn fuzz_body(which: usize, bytes: &[u8]) {
    let all: Vec<_> = operations().into_iter().filter(|one| one.body.is_some()).collect();
    let op = &all[which % all.len()];
    let files = || vec![PostureFile { name: "fuzz.yaml".into(), text: POSTURE.into() }];
    let put = |section, value| {
        if let Ok(files) = views::put(files(), section, "fuzz", &value) {
            views::spec(&files).ok();
        }
    };
    match op.id {
        "login" => read::<Login>(bytes),
        "change_password" => read::<PasswordChange>(bytes),
        "enrol_totp" => read::<TotpEnrol>(bytes),
        "verify_totp" | "remove_totp" => read::<TotpCode>(bytes),
        "oidc_start" => read::<OidcStart>(bytes),
        "oidc_finish" => read::<OidcFinish>(bytes),
        "create_user" => read::<NewUser>(bytes),
        "change_user" => read::<UserChange>(bytes),
        "create_service_account" => read::<NewServiceAccount>(bytes),
        "change_service_account" => read::<ServiceAccountChange>(bytes),
        "create_api_key" => read::<NewKey>(bytes),
        "check_posture" => read::<PostureQuestion>(bytes),
        "put_posture" => {
            if let Ok(change) = parse::<PostureChange>(bytes) {
                views::spec(&change.files).ok();
            }
        }
        "return_to_posture" => read::<ReturnChange>(bytes),
        "put_file" => read::<FileText>(bytes),
        "put_security_group" => {
            if let Ok(group) = parse::<GroupSpec>(bytes) {
                put(Section::Groups, views::group_value(&group));
            }
        }
        "put_prefix_list" => {
            if let Ok(list) = parse::<PrefixListSpec>(bytes) {
                put(Section::PrefixLists, serde_json::to_value(list).unwrap_or_default());
            }
        }
        "put_port_list" => {
            if let Ok(list) = parse::<PortListSpec>(bytes) {
                put(Section::PortLists, serde_json::to_value(list).unwrap_or_default());
            }
        }
        "put_declared_instance" => {
            if let Ok(instance) = parse::<InstanceSpec>(bytes) {
                put(Section::Instances, serde_json::to_value(instance).unwrap_or_default());
            }
        }
        "add_rule" => {
            if let Ok(rule) = parse::<RuleSpec>(bytes) {
                views::edit_rule(files(), "web", Direction::Egress, &RuleWork::Add(Box::new(rule))).ok();
            }
        }
        "change_rule" => {
            if let Ok(change) = parse::<RuleEdit>(bytes) {
                views::edit_rule(files(), "web", Direction::Ingress, &RuleWork::Change(0, change)).ok();
            }
        }
        "change_instance" => read::<InstanceChange>(bytes),
        "create_token" => read::<TokenSpec>(bytes),
        other => unreachable!("the body of {other} is not fuzzed: add it here"),
    }
}

fn read<T: DeserializeOwned>(bytes: &[u8]) {
    parse::<T>(bytes).ok();
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_body_of_the_catalogue_is_fuzzed() {
        for which in 0..100 {
            super::fuzz_body(which, b"{}");
            super::fuzz_body(which, b"{\"a\":1");
        }
    }
}
