{{- /* A server's settings as a JSON object: {root, server}. The image's own are said again, so that the pod tells all. */ -}}
{{- define "rmd.settings" -}}
{{- $values := .root.Values }}
{{- $server := .server }}
{{- $name := printf "%s-%s" (include "rmd.name" .root) $server.name }}
{{- $own := dict "host" "0.0.0.0" "port" 8000 "checkpoint" $server.checkpoints "engines" "/engines" "videos" "/films" "allow_open" $values.allowOpen }}
{{- if gt (int $server.gpus) 1 }}
{{- $devices := list }}{{ range until (int $server.gpus) }}{{ $devices = append $devices (printf "cuda:%d" .) }}{{ end }}
{{- $_ := set $own "devices" $devices }}
{{- else }}
{{- $_ := set $own "device" (ternary "cuda" "cpu" (gt (int $server.gpus) 0)) }}
{{- end }}
{{- if $server.hardware.engines.build }}{{ $_ := set $own "build_missing" false }}{{ end }}
{{- with $server.host }}{{ $_ := set $own "public_url" (printf "https://%s" .) }}{{ end }}
{{- if $values.allowOpen }}
{{- /* Without keys a server answers to the names it knows. */}}
{{- $service := list $name (printf "%s.%s" $name .root.Release.Namespace) (printf "%s.%s.svc" $name .root.Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .root.Release.Namespace) }}
{{- $_ := set $own "allowed_hosts" (concat $service (default list $server.settings.allowed_hosts)) }}
{{- end }}
{{- toJson (mergeOverwrite (deepCopy $server.settings) $own) }}
{{- end }}

{{- /* The same as variables. */ -}}
{{- define "rmd.environment" -}}
{{- range $setting, $value := include "rmd.settings" . | fromJson }}
- {name: RMD_{{ upper $setting }}, value: {{ include "rmd.setting" $value | quote }}}
{{- end }}
{{- include "rmd.secretEnvironment" . }}
{{- end }}

{{- /* The settings that come from Secrets: {root}. */ -}}
{{- define "rmd.secretEnvironment" -}}
{{- $values := .root.Values }}
{{- with $values.apiKeys.secret }}
- name: RMD_API_KEYS
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $values.apiKeys.key }}}}
{{- end }}
{{- with $values.database.secret }}
- name: RMD_VIDEO_DATABASE
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $values.database.key }}}}
{{- end }}
{{- end }}
