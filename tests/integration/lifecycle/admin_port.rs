//! What general tools find on the admin port: gRPC health and reflection.

use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::deployment::Control;

#[tokio::test]
async fn health_is_told_without_a_token() {
    let control = Control::start().await;
    let mut health = HealthClient::new(channel(&control).await);
    for service in ["", "relatch.admin.v1.Admin"] {
        let service = service.to_owned();
        let answer = health.check(HealthCheckRequest { service }).await;
        let status = answer.expect("it answers").into_inner().status();
        assert_eq!(status, ServingStatus::Serving);
    }
    let service = "unknown".to_owned();
    let unknown = health.check(HealthCheckRequest { service }).await;
    let unknown = unknown.expect_err("there is no such service");
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn reflection_describes_the_admin_api() {
    let control = Control::start().await;
    let channel = channel(&control).await;
    let services = match reflect(&channel, MessageRequest::ListServices(String::new())).await {
        MessageResponse::ListServicesResponse(list) => list.service,
        other => panic!("no list: {other:?}"),
    };
    let names: Vec<&str> = services
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    assert!(names.contains(&"relatch.admin.v1.Admin"), "{names:?}");
    let symbol = "relatch.admin.v1.Admin.StartRotation".to_owned();
    let files = match reflect(&channel, MessageRequest::FileContainingSymbol(symbol)).await {
        MessageResponse::FileDescriptorResponse(files) => files.file_descriptor_proto,
        other => panic!("no description: {other:?}"),
    };
    assert!(!files.is_empty());
}

async fn channel(control: &Control) -> Channel {
    let uri = format!("http://{}", control.plane.admin());
    let endpoint = Channel::from_shared(uri).expect("an address");
    endpoint.connect().await.expect("it listens")
}

async fn reflect(channel: &Channel, question: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await;
    let answer = answers.expect("it answers").into_inner().message().await;
    let answer = answer.expect("it answers").expect("one answer a question");
    answer.message_response.expect("an answer says something")
}
